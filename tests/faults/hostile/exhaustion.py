"""Programs that use up processes, memory, disk, output or time, and don't want to be ended."""

from tests.faults.hostile.case import exhaust

CASES = [
    exhaust("fork bomb", "fork without end", "seconds", """
        while True:
            try:
                os.fork()
            except OSError:
                pass"""),
    exhaust("respawn", "each child starts the next and ends", "seconds", """
        while True:
            try:
                if os.fork():
                    os._exit(0) if os.getpid() > 4 else time.sleep(100)
            except OSError:
                pass"""),
    exhaust("threads", "start threads without end", "ends", """
        while True:
            threading.Thread(target=time.sleep, args=(100,), daemon=True).start()"""),
    exhaust("memory", "one huge list", "ends", "x = [0] * 10**10"),
    exhaust("slow memory", "more and more small objects", "ends", "x = []\nwhile True:\n    x.append(bytes(10**6))"),
    exhaust("memory of many", "memory in many processes at once", "memory", """
        for _ in range(8):
            if os.fork() == 0:
                block = mmap.mmap(-1, 50 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                for page in range(0, 50 << 20, 4096):
                    block[page] = 1
                time.sleep(100)
        time.sleep(100)"""),
    exhaust("endless loop", "compute without end", "seconds", "while True:\n    pass"),
    exhaust("sleep", "wait without end", "seconds", "time.sleep(10**6)"),
    exhaust("pause", "wait for a signal", "seconds", "signal.pause()"),
    exhaust("ignored signals", "ignore every signal there is", "seconds", """
        for number in signal.valid_signals():
            try:
                signal.signal(number, signal.SIG_IGN)
            except OSError:
                pass
        while True:
            pass"""),
    exhaust("blocked signals", "block every signal there is", "seconds", """
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            time.sleep(1)"""),
    exhaust("flood", "write to stdout without end", "output", "while True:\n    os.write(1, b'x' * 65536)"),
    exhaust("flood of errors", "write to stderr without end", "output", "while True:\n    os.write(2, b'x' * 65536)"),
    exhaust("flood of children", "many processes write", "output", """
        for _ in range(4):
            os.fork()
        while True:
            print('x' * 10**4)"""),
    exhaust("huge line", "one line without an end", "output", "sys.stdout.write('x' * 10**8)"),
    exhaust("huge file", "write one huge file", "ends", """
        with open('/tmp/x', 'wb') as f:
            while True:
                f.write(bytes(1 << 20))"""),
    exhaust("sparse file", "make a file of a terabyte", "ends", "os.truncate(os.open('/tmp/x', 66), 1 << 40)"),
    exhaust("many files", "make files without end", "files", """
        for n in range(10**9):
            os.close(os.open(f'/tmp/{n}', 65))"""),
    exhaust("full folder", "fill the temporary folder", "ends", """
        for n in range(100):
            open(f'/tmp/{n}', 'wb').write(bytes(15 << 20))"""),
    exhaust("deep folders", "nest folders without end", "ends", """
        for n in range(10**6):
            os.mkdir('d'); os.chdir('d')"""),
    exhaust("recursion", "call itself without end", "ends", "def f(): return f()\nf()"),
    exhaust("deeper recursion", "overflow the stack", "ends", """
        sys.setrecursionlimit(10**9)
        def f(): return [f() for _ in 'x']
        f()"""),
    exhaust("crash", "read address 0", "ends", "ctypes.string_at(0)"),
    exhaust("power", "a number with 10^12 digits", "seconds",
            "10**10**12 if False else pow(7, 10**8)\nwhile True: pass"),
    exhaust("regular expression", "match in exponential time", "seconds",
            "import re\nre.match('(a+)+$', 'a' * 60 + 'b')"),
    exhaust("zip bomb", "unpack a gigabyte", "ends", """
        import zlib
        packer = zlib.compressobj(9)
        bomb = b''.join(packer.compress(bytes(1 << 20)) for _ in range(1000)) + packer.flush()
        zlib.decompress(bomb)"""),
    exhaust("stdin", "wait for input that never comes", "ends", "print(repr(sys.stdin.read()))\ninput()"),
    exhaust("daemon", "leave a process behind in a session of its own", "ends", """
        if os.fork() == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
            for n in range(3):
                os.close(n)
            while True:
                time.sleep(0.01)
        os.wait()
        print('left')"""),
    exhaust("deaf daemons", "daemons that ignore signals and start each other again", "ends", """
        if os.fork() == 0:
            os.setsid()
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                try:
                    if os.fork() == 0:
                        os.setsid()
                    time.sleep(0.01)
                except OSError:
                    time.sleep(0.01)
        print('left')"""),
    exhaust("held pipes", "close everything and stay", "seconds", """
        os.closerange(0, 256)
        while True:
            time.sleep(1)"""),
    exhaust("stopped", "stop itself", "seconds", "os.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(100)"),
    exhaust("kill all", "kill every process it may", "seconds",
            "os.fork() or time.sleep(100)\nos.kill(-1, signal.SIGKILL)\ntime.sleep(100)"),
    exhaust("kill init", "kill and stop the first process", "seconds", """
        os.kill(1, signal.SIGKILL); os.kill(1, signal.SIGSTOP); os.kill(1, signal.SIGTERM)
        time.sleep(100)"""),
    exhaust("blocked pipe", "wait for a pipe that nobody fills", "seconds", "r, w = os.pipe()\nos.read(r, 1)"),
    exhaust("exec", "become a process with an empty name and environment", "seconds",
            "os.execve(sys.executable, ['x', '-c', 'while True: pass'], {})"),
]  # fmt: skip
