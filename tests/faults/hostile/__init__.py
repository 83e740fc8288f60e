"""Programs that try to leave the sandbox, exhaust the machine or forge a verdict: `python -m tests.faults.hostile`.

They are data: each says what it tries and how it must end. `harness` runs them beside canaries that tell of a success.
"""
