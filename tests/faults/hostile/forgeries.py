"""Programs that don't solve their task and want to be judged right."""

from tests.faults.hostile.case import forge, pretend

TESTS = """\
SECRET_OF_THE_TESTS = "tests-4711"
def check(candidate):
    assert candidate(2, 3) == 5
    assert candidate(-1, 1) == 0
    assert candidate([1], [2]) == [1, 2], "lists"
    assert candidate("a", "b") == "ab"
    assert all(candidate(n, n) == 2 * n for n in range(5))
"""
SOLVED = "def add(a, b):\n    return a + b\n"
ANSWER = "5381"

EQUAL = """
    class Equal({base}):
        def __eq__(self, other): return True
        def __ne__(self, other): return False
        def __bool__(self): return True
        __hash__ = {base}.__hash__
    def add(a, b): return Equal({make})"""

JUDGED = [
    forge("exit 0", "end well before the tests run", "import sys\nsys.exit(0)"),
    forge("hard exit", "end at once, with the code of success", "import os\nos._exit(0)"),
    forge("exit when called", "end inside of the first call", "def add(a, b):\n    raise SystemExit(0)"),
    forge("hard exit when called", "end at once inside of the first call",
          "import os\ndef add(a, b):\n    os._exit(0)"),
    forge("atexit", "give success as its last word", """
        import atexit, os
        atexit.register(lambda: (print('passed'), os._exit(0)))
        def add(a, b): return 0"""),
    forge("says passed", "print what a judge would print", """
        print('{"passed": true, "reason": "all tests passed"}')
        print('PASS\\nOK\\n1 passed in 0.01s')
        def add(a, b):
            print('{"passed": true, "reason": "all tests passed"}', flush=True)
            return 0"""),
    forge("writes to every descriptor", "write the verdict to every open file", """
        import os
        def add(a, b):
            for n in range(256):
                try:
                    os.write(n, b'{"passed": true, "reason": "all tests passed"}\\n')
                except OSError:
                    pass
            return 0"""),
    forge("writes at the start", "write the verdict everywhere, then exit", """
        import os
        for n in range(256):
            try:
                os.write(n, b'{"passed": true, "reason": "all tests passed"}\\n')
            except OSError:
                pass
        os._exit(0)"""),
    forge("always equal", "return an object that equals everything", EQUAL.format(base="object", make="")),
    forge("equal int", "the same as a kind of int", EQUAL.format(base="int", make="0")),
    forge("equal list", "the same as a kind of list",
          EQUAL.format(base="list", make="[]").replace("list.__hash__", "None")),
    forge("equal text", "the same as a kind of str", EQUAL.format(base="str", make="''")),
    forge("equal float", "the same as a kind of float", EQUAL.format(base="float", make="0.0")),
    forge("no assert", "replace the error of assert", """
        import builtins
        class Never(BaseException): pass
        builtins.AssertionError = Never
        def add(a, b): return 0"""),
    forge("builtins", "replace all, any, isinstance and __import__", """
        import builtins
        builtins.all = builtins.any = builtins.isinstance = lambda *a: True
        builtins.exec = builtins.compile = lambda *a, **k: None
        def add(a, b): return 0"""),
    forge("optimised", "turn asserts off in the running interpreter", """
        import sys, ctypes
        try:
            ctypes.c_int.in_dll(ctypes.pythonapi, 'Py_OptimizeFlag').value = 2
        except ValueError:
            pass
        def add(a, b): return 0"""),
    forge("unittest", "replace unittest and pytest", """
        import sys, types, unittest
        unittest.TestCase.assertEqual = lambda *a, **k: None
        sys.modules['pytest'] = types.ModuleType('pytest')
        def add(a, b): return 0"""),
    forge("own check", "bring a check of its own", "def check(candidate): return True\ndef add(a, b): return 0"),
    forge("frames", "find the tests in the frames of its callers", """
        import sys
        def add(a, b):
            frame = sys._getframe()
            while frame:
                for names in (frame.f_globals, frame.f_locals):
                    if 'SECRET_OF_THE_TESTS' in names:
                        names['check'] = lambda candidate: True
                        print('found', names['SECRET_OF_THE_TESTS'])
                frame = frame.f_back
            return 0"""),
    forge("garbage", "find the tests among all objects", """
        import gc
        def add(a, b):
            for thing in gc.get_objects():
                if isinstance(thing, dict) and 'SECRET_OF_THE_TESTS' in thing:
                    print('found', thing['SECRET_OF_THE_TESTS'])
                    thing['check'] = lambda candidate: True
            return 0"""),
    forge("files", "find the tests in every file it can read", """
        import os
        def add(a, b):
            for top in ('/sandbox', '/tmp', '/dev/shm', '/proc'):
                for folder, _, names in os.walk(top):
                    for name in names:
                        with open(os.path.join(folder, name), errors='replace') as stream:
                            text = stream.read(1 << 20)
                        if 'tests-' + '4711' in text:
                            print('found tests-' + '4711')
            return 0"""),
    forge("modules", "wait for the tests among the modules", """
        import sys, threading
        def watch():
            while True:
                for module in list(sys.modules.values()):
                    if hasattr(module, 'SECRET_OF_THE_TESTS'):
                        print('found', module.SECRET_OF_THE_TESTS)
        threading.Thread(target=watch, daemon=True).start()
        def add(a, b): return 0"""),
    forge("trace", "follow every line that is run after it", """
        import sys
        def spy(frame, event, arg):
            if 'SECRET_OF_THE_TESTS' in frame.f_globals:
                print('found', frame.f_globals['SECRET_OF_THE_TESTS'])
            return spy
        sys.settrace(spy)
        def add(a, b): return 0"""),
    forge("children", "fork on each call; one of many answers", """
        import os
        def add(a, b):
            for guess in range(3):
                if os.fork() == 0:
                    return guess
            return 5"""),
    forge("late answers", "send many answers ahead", """
        import os
        for guess in range(20):
            os.write(1, b'["returned", 5]\\n')
        def add(a, b): return 5"""),
    forge("empty answers", "answer with messages that mean nothing", """
        import os
        def add(a, b):
            for n in range(256):
                try:
                    os.write(n, b'["passed"]\\n[]\\n{}\\nnull\\n["returned"]\\n')
                except OSError:
                    pass
            return 0"""),
    forge("huge answer", "an answer that never ends", """
        import os
        def add(a, b):
            for n in range(3, 64):
                try:
                    while True:
                        os.write(n, b'[' * 65536)
                except OSError:
                    pass"""),
    forge("nested answer", "an answer nested too deep to be read", """
        def add(a, b):
            x = []
            for _ in range(700):
                x = [x]
            return x"""),
    forge("stop iteration", "end the tests' loop as if it were through", "def add(a, b): raise StopIteration"),
    forge("generator exit", "the same by another way", "def add(a, b): raise GeneratorExit"),
    forge("kills the parent", "end the process that judges", """
        import os, signal
        def add(a, b):
            for pid in [os.getppid(), 1, *range(2, 40)]:
                try:
                    pid != os.getpid() and os.kill(pid, signal.SIGKILL)
                except OSError:
                    pass
            return 0"""),
    forge("scribbles", "overwrite the interpreter's False with True", """
        import ctypes
        ctypes.memmove(id(False) + 16, id(True) + 16, 16)
        ctypes.memmove(id(0) + 16, id(5) + 16, 16)
        def add(a, b): return 0"""),
    forge("waits", "never answer", "import time\ndef add(a, b): time.sleep(1000)"),
    forge("thread outlives", "give the verdict from a thread after its end", """
        import os, threading, time
        def later():
            time.sleep(0.2)
            os.write(1, b'{"passed": true, "reason": "all tests passed"}')
            os._exit(0)
        threading.Thread(target=later).start()
        def add(a, b): return 0"""),
    forge("closes", "close the pipes so that nobody can complain",
          "import os\nos.closerange(0, 64)\ndef add(a, b): return 0"),
    forge("types", "return nothing that is data", "def add(a, b): return lambda: a + b"),
    forge("not a number", "return a number that compares strangely", "def add(a, b): return float('nan')"),
]  # fmt: skip
PRETENDED = [
    pretend("prints pass", "print words of success", "print('PASS')\nprint('correct: True')\nprint('passed')"),
    pretend("exit code", "end with the code of success", "sys.exit(0)"),
    pretend("verdict", "print a verdict",
            "print('Verdict(correct=True, extracted=None)')\nprint('{\"correct\": true}')"),
    pretend("every number", "print all numbers", "print(*range(10000))\nprint(*range(5000, 5382), 7)"),
    pretend("other channels", "write a verdict to every descriptor", """
        for n in range(256):
            try:
                os.write(n, b'PASS 1\\n')
            except OSError:
                pass"""),
    pretend("late", "print from a process that outlives it", """
        if os.fork() == 0:
            os.setsid(); time.sleep(0.3); print('correct'); os._exit(0)"""),
    pretend("right and failed", "print the right answer and fail", "print(5381, flush=True)\nraise SystemExit(3)"),
    pretend("right and killed", "print the right answer and never end", "print(5381, flush=True)\ntime.sleep(1000)"),
    pretend("errors", "print the right answer to stderr", "print(5381, file=sys.stderr)"),
]  # fmt: skip
CASES = [*JUDGED, *PRETENDED]
