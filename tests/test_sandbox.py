"""Hostile programs: none passes, none harms the process that judges, none lives on. Honest ones pass."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT

from gcpo import sandbox
from gcpo.sandbox import LAYERS, SandboxError, judge, layers, run, run_many

LINUX = sys.platform == "linux"
NAMESPACES = ("user namespace", "pid namespace", "mount namespace", "file system view", "network namespace", "ipc namespace", "uts namespace")
linux = pytest.mark.skipif(not LINUX, reason="needs Linux")
isolated = pytest.mark.skipif(not LINUX or layers()["pid namespace"] != "active" or layers()["file system view"] != "active", reason=f"no namespaces here: {layers()}")


def named(mark):
    "The processes that go by this name (a forked process keeps its parent's)."
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().strip() == mark:
                found.append(path.parent.name)
        except OSError:
            pass
    return found


@pytest.fixture(autouse=True, scope="module")
def own_temporary_directory():
    "Others may use the common one meanwhile."
    usual = tempfile.tempdir
    with tempfile.TemporaryDirectory(dir="/tmp" if LINUX else None) as place:
        os.chmod(place, 0o1777)
        tempfile.tempdir = place
        yield
        tempfile.tempdir = usual


class World:
    "What a program must not touch: a process, a file, a listening port; and the name by which its own processes are known."

    def __init__(self, directory):
        self.mark = "m" + os.urandom(6).hex()
        self.bystander = subprocess.Popen(["sleep", "600"])
        self.pace = self.paces()
        self.file = directory / "precious.txt"
        self.file.write_text("precious")
        os.chmod(directory, 0o777)
        os.chmod(self.file, 0o666)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(0.02)
        self.before = set(os.listdir(tempfile.gettempdir()))
        self.descriptors = len(os.listdir("/dev/fd"))
        self.shared = self.segments()

    def source(self, text):
        name = f"import ctypes; ctypes.CDLL(None).prctl(15, b'{self.mark}', 0, 0, 0); del ctypes\n" if LINUX else ""
        return name + text.replace("PRECIOUS", str(self.file)).replace("PORT", str(self.listener.getsockname()[1])).replace("PARENT", str(os.getpid())).replace("BYSTANDER", str(self.bystander.pid))

    def segments(self):
        return [line for kind in ("shm", "sem", "msg") if (path := Path("/proc/sysvipc", kind)).exists() for line in path.read_text().splitlines() if line.split()[0] == "0"]

    def paces(self):
        return [(os.getpriority(os.PRIO_PROCESS, pid), os.sched_getaffinity(pid), os.sched_getscheduler(pid)) for pid in (self.bystander.pid, os.getpid())] if LINUX else []

    def unharmed(self):
        assert self.bystander.poll() is None, "the bystander was killed"
        assert self.paces() == self.pace, "the bystander was slowed"
        assert not LINUX or self.segments() == self.shared, "shared memory was left behind"
        assert self.file.read_text() == "precious" and os.listdir(self.file.parent) == ["precious.txt"]
        with pytest.raises(TimeoutError):
            self.listener.accept()
        assert not named(self.mark), "a process lives on"
        assert not {name for name in set(os.listdir(tempfile.gettempdir())) - self.before if name.startswith("gcpo-")}, "a directory was left behind"
        assert len(os.listdir("/dev/fd")) == self.descriptors, "open files were left behind"

    def close(self):
        self.bystander.kill()
        self.bystander.wait()
        self.listener.close()


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.close()


DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(64):
            try: os.close(fd)
            except OSError: pass
        time.sleep(60)
    os._exit(0)
os.wait()
"""
OPEN_FILES = "import os\nfor fd in range(64):\n    try: os.write(fd, b'passed')\n    except OSError: pass\n"
SHARED = "import ctypes\nif ctypes.CDLL(None).NAME(0, SIZE0o1600) < 0: raise PermissionError()\nassert False, 'made'"
DENIED = r"PermissionError|OSError|FileNotFoundError|ended before|ProcessLookupError"

HOSTILE = {
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "timed out after 1 s"),
    "fork bomb that leaves": ("import os\nfor _ in range(100): os.fork()", r"BlockingIOError|ended before"),
    "thread bomb": ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()", r"RuntimeError: can't start new thread|timed out|memory limit"),
    "endless loop": ("while True: pass", "timed out after 1 s"),
    "sleep": ("import time; time.sleep(60)", "timed out after 1 s"),
    "list balloon": ("a = []\nwhile True: a.append([0] * 100_000)", "memory limit of 128 MiB"),
    "bytearray balloon": ("bytearray(1 << 34)", "memory limit of 512 MiB"),
    "string balloon": ("a = 'x'\nwhile True: a += a", "memory limit of 128 MiB"),
    "recursive balloon": ("def f(n): return [n] * 10**6, f(n + 1)\nimport sys; sys.setrecursionlimit(10**6); f(0)", r"memory limit of 128 MiB|killed by SIGSEGV"),
    "deep recursion": ("def f(n): return f(n + 1)\nf(0)", "RecursionError"),
    "recursion without a limit": ("import sys; sys.setrecursionlimit(10**9)\nclass A:\n    def __getattr__(self, n): return getattr(self, n + 'x')\nA().a", r"killed by SIGSEGV|memory limit|RecursionError|timed out"),
    "gigabytes of stdout": ("while True: print('x' * 100_000)", "killed: more than 16 MiB of output"),
    "gigabytes of stderr": ("import os\nwhile True: os.write(2, b'x' * 100_000)", "killed: more than 16 MiB of output"),
    "writing outside": ("open('PRECIOUS', 'w').write('mine')", DENIED),
    "reading outside": ("print(open('PRECIOUS').read())\nassert False, 'read'", DENIED),
    "writing to the root": ("open('/x', 'w')", DENIED),
    "a large file": ("f = open('a', 'wb')\nwhile True: f.write(bytes(1 << 20))", r"OSError: \[Errno 27\] File too large"),
    "many files": ("for i in range(10**9):\n    with open(f'{i}', 'wb') as f: f.write(bytes(1 << 22))", r"No space left on device|timed out"),
    "many directories": ("import os\nfor i in range(10**9): os.mkdir(f'{i}')", r"No space left on device|timed out"),
    "deep closed directories": ("import os\nfor i in range(400): os.mkdir('d'); os.chdir('d')\nos.chmod('..', 0); 1/0", "ZeroDivisionError"),
    "deleting its directory": ("import os, shutil\nshutil.rmtree(os.getcwd(), ignore_errors=True)\nos.getcwd(); open('a', 'w').close(); 1/0", r"ZeroDivisionError|FileNotFoundError"),
    "deleting everything": ("import shutil; shutil.rmtree('/', ignore_errors=True); 1/0", "ZeroDivisionError"),
    "killing the parent": ("import os; os.kill(PARENT, 9); os.kill(BYSTANDER, 9)", DENIED),
    "killing a bystander": ("import os; os.kill(BYSTANDER, 9)", DENIED),
    "killing all": ("import os; os.kill(-1, 9); 1/0", r"killed by SIGKILL|PermissionError|ProcessLookupError|ZeroDivisionError"),
    "killing its group": ("import os; os.killpg(0, 9)", "killed by SIGKILL"),
    "killing its parents": ("import os\nfor pid in (os.getppid(), 1): os.kill(pid, 9)\n1/0", r"ZeroDivisionError|PermissionError|ProcessLookupError"),
    "deaf to signals": ("import signal\nfor s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU): signal.signal(s, signal.SIG_IGN)\nwhile True: pass", "timed out after 1 s"),
    "stopping itself": ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", "timed out after 1 s"),
    "outgoing socket": ("import socket; socket.create_connection(('1.1.1.1', 80), timeout=5)", DENIED),
    "local socket": ("import socket; socket.create_connection(('127.0.0.1', PORT), timeout=5)", DENIED),
    "udp socket": ("import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT)); assert False", DENIED),
    "daemon": (DAEMON + "assert False, 'left'", r"AssertionError: left|PermissionError|BlockingIOError"),
    "os._exit": ("import os; os._exit(0)\nassert False", r"ended before its last line \(exit code 0\)"),
    "sys.exit": ("import sys; sys.exit(0)\nassert False", r"ended before its last line \(exit code 0\)"),
    "quit": ("quit()\nassert False", r"ended before its last line \(exit code 0\)"),
    "exit in atexit": ("import atexit, os; atexit.register(os._exit, 0)\nassert False, 'still'", "AssertionError: still"),
    "exit in excepthook": ("import sys, os; sys.excepthook = lambda *a: os._exit(0)\nassert False, 'still'", "AssertionError: still"),
    "exit in a thread": ("import threading, os, time\nthreading.Thread(target=os._exit, args=(0,)).start()\ntime.sleep(1)\nassert False", r"ended before its last line \(exit code 0\)"),
    "exit in a finalizer": ("import os\nclass A:\n    def __del__(self): os._exit(0)\ndef f():\n    a = A()\n    assert False\nf()", r"ended before|AssertionError"),
    "exit in a message": ("import os\nclass E(Exception):\n    def __str__(self): os._exit(0)\nraise E()", r"ended before its last line \(exit code 0\)"),
    "endless message": ("class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E()", "timed out after 1 s"),
    "lying exit status": ("raise SystemExit('passed')", "ended before its last line"),
    "exec of another program": ("import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'pass'])", DENIED),
    "writing to all open files": (OPEN_FILES + "os._exit(0)", r"^ended before its last line \(exit code 0\)"),
    "forging the verdict": (OPEN_FILES + "os._exit(1)", "^said 'passed"),
    "reading memory": ("open('/proc/PARENT/mem', 'rb')", DENIED),
    "reading the environment": ("print(open('/proc/PARENT/environ').read()); assert False, 'read'", DENIED),
    "reading its parent": ("import os; print(open(f'/proc/{os.getppid()}/environ').read()); print(open(f'/proc/{os.getppid()}/mem').read())", DENIED),
    "ptrace": ("import ctypes\nif ctypes.CDLL(None).ptrace(16, PARENT, 0, 0) < 0: raise PermissionError()", "PermissionError"),
    "process_vm_readv": ("import ctypes\nif ctypes.CDLL(None).process_vm_readv(BYSTANDER, 0, 0, 0, 0, 0) < 0: raise PermissionError()\nassert False", "PermissionError"),
    "threads that never end": ("import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()", "timed out after 1 s"),
    "segmentation fault": ("import ctypes; ctypes.string_at(0)", "killed by SIGSEGV"),
    "SIGSEGV": ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
    "abort": ("import os; os.abort()", "killed by SIGABRT"),
    "huge integer": ("a = 7 ** 7 ** 9", r"timed out|memory limit"),
    "integer to text": ("str(10 ** 10_000)", r"ValueError: Exceeds the limit"),
    "regex catastrophe": ("import re; re.match(r'(a+)+$', 'a' * 50 + 'b')", "timed out after 1 s"),
    "absent module": ("import numpy", "ModuleNotFoundError: No module named 'numpy'"),
    "the project": ("import gcpo", "ModuleNotFoundError"),
    "reading stdin": ("import sys; assert sys.stdin.read() == ''; input()", "EOFError"),
    "the environment": ("import os; assert os.environ, 'empty'", "AssertionError: empty"),
    "limits back": ("import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))", r"ValueError: not allowed to raise maximum limit|PermissionError"),
    "unshare": ("import ctypes\nif ctypes.CDLL(None).unshare(0x10000000): raise PermissionError()", "PermissionError"),
    "mount": ("import ctypes\nif ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, 0): raise PermissionError()", "PermissionError"),
    "chroot": ("import os; os.chroot('.')", "PermissionError"),
    "becoming root": ("import os; os.setuid(0); os.setgroups([0]); 1/0", r"PermissionError|ZeroDivisionError"),
    "symlink out": ("import os; os.symlink('PRECIOUS', 'link'); open('link', 'w').write('mine')", DENIED),
    "hard link out": ("import os; os.link('PRECIOUS', 'link'); open('link', 'w').write('mine')", DENIED),
    "socket file": ("import socket; socket.socket(socket.AF_UNIX).bind('\\0gcpo')", DENIED),
    "NUL bytes": ("a = 1\0", "not Python"),
    "shared memory that no limit counts": (SHARED.replace("NAME", "shmget").replace("SIZE", "67108864, "), "PermissionError"),
    "semaphores that outlive it": (SHARED.replace("NAME", "semget").replace("SIZE", "1, "), "PermissionError"),
    "message queues that outlive it": (SHARED.replace("NAME", "msgget").replace("SIZE", ""), "PermissionError"),
    "memory in files without a name": ("import os\nkept = []\nfor _ in range(40):\n    kept.append(os.memfd_create('a'))\n    os.write(kept[-1], bytes(16 << 20))\nassert False, 'held'", "PermissionError"),
    "a signal from a pipe": ("import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, BYSTANDER)\nfcntl.fcntl(r, 10, 9)\nfcntl.fcntl(r, fcntl.F_SETFL, fcntl.fcntl(r, fcntl.F_GETFL) | os.O_ASYNC)\nos.write(w, b'x')\nassert False, 'sent'", DENIED),
    "a signal from a socket": ("import fcntl, socket, struct\na, b = socket.socketpair()\nfcntl.ioctl(a, 0x8901, struct.pack('i', BYSTANDER))\nfcntl.fcntl(a, 10, 9)\nfcntl.fcntl(a, fcntl.F_SETFL, 0o20000)\nb.send(b'x')\nassert False, 'sent'", DENIED),
    "slowing a bystander": ("import os\nos.setpriority(os.PRIO_PROCESS, BYSTANDER, 19)", DENIED),
    "pinning a bystander": ("import os\nos.sched_setaffinity(BYSTANDER, [min(os.sched_getaffinity(0))])\nos.sched_setscheduler(BYSTANDER, os.SCHED_IDLE, os.sched_param(0))", DENIED),
    "idling a bystander": ("import os\nos.sched_setscheduler(BYSTANDER, os.SCHED_IDLE, os.sched_param(0))", DENIED),
    "the kernel's keys": ("import ctypes, os\nif ctypes.CDLL(None).syscall({'x86_64': 248, 'aarch64': 217}[os.uname().machine], b'user', b'a', b'b', 1, -3) < 0: raise PermissionError()\nassert False", "PermissionError"),
    "system calls of 32 bits": ("import ctypes, mmap\npage = mmap.mmap(-1, 4096, prot=7)\npage.write(bytes.fromhex('b814000000cd80c3'))\nctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()\nassert False, 'called'", r"killed by SIG(SYS|ILL|SEGV)"),
    "a set-user-ID program": ("import os\nfor name in ('su', 'mount', 'passwd'):\n    try: os.execv('/usr/bin/' + name, [name])\n    except OSError as e: last = e\nraise last", DENIED),
    "writing its own memory": ("open('/proc/self/mem', 'r+b')", DENIED),
    "a child's verdict": ("import os\nif os.fork() == 0:\n    os.write(3, b'passed')\n    os._exit(0)\nos.wait()\nos._exit(0)", r"ended before its last line|BlockingIOError"),
    "exit in flush": ("import os, sys\nclass Out:\n    def flush(self): os._exit(0)\n    write = len\nsys.stdout = Out()\nassert False", r"ended before its last line \(exit code 0\)"),
    "an alarm that exits": ("import os, signal\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\nsignal.setitimer(signal.ITIMER_REAL, 0.1)\nwhile True: pass", r"ended before its last line \(exit code 0\)"),
    "surrogates": ("a = '\udc80'", "not Python: UnicodeEncodeError"),
    "no Python": ("def f(:", "not Python: SyntaxError"),
    "deep brackets": ("(" * 100_000, "not Python|memory limit"),
    "10 MB of source": ("x = 1\n" * 1_700_000 + "assert False, 'end'", r"timed out|memory limit|AssertionError: end"),
    "memory hidden in caught errors": ("a = []\nwhile True:\n    try: a.append(bytearray(1 << 24))\n    except MemoryError: pass", "timed out after 1 s"),
}


@linux
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name, world):
    source, told = HOSTILE[name]
    verdict = run(world.source(source) if name != "10 MB of source" else source, **limits(told))
    assert not verdict.passed and verdict.reason != "passed", verdict
    assert re.search(told, verdict.reason), verdict
    assert verdict.seconds < 7 and len(verdict.output) <= 65536
    world.unharmed()


def limits(told):
    "A smaller memory and more time for the balloons, which a busy machine fills slowly."
    return dict(timeout=5, memory_mb=128) if "128 MiB" in told else dict(timeout=1)


CONTAINER = ["fork bomb", "endless loop", "list balloon", "gigabytes of stdout", "writing outside", "reading outside", "a large file", "deep closed directories", "deleting its directory", "killing the parent", "killing all",
             "killing its group", "killing its parents", "stopping itself", "outgoing socket", "local socket", "daemon", "os._exit", "reading memory", "reading the environment", "reading its parent", "ptrace", "unshare",
             "mount", "limits back", "symlink out", "hard link out", "the project", "absent module", "threads that never end", "shared memory that no limit counts", "semaphores that outlive it", "message queues that outlive it", "memory in files without a name",
             "a signal from a pipe", "a signal from a socket", "slowing a bystander", "pinning a bystander", "idling a bystander", "the kernel's keys", "system calls of 32 bits"]


@isolated
@pytest.mark.skipif(layers()["seccomp"] != "active" or layers()["landlock"] != "active", reason=f"no seccomp or Landlock here: {layers()}")
@pytest.mark.parametrize("name", CONTAINER)
def test_hostile_as_in_a_container_without_namespaces(name, world):
    source, told = HOSTILE[name]
    verdict = run(world.source(source), without=NAMESPACES, **limits(told))
    assert not verdict.passed and re.search(told, verdict.reason), verdict
    assert not set(NAMESPACES) & set(verdict.layers)
    world.unharmed()


WALLS = [(name, off) for off in (["landlock"], ["seccomp"], ["landlock", "seccomp"], ["file system view"]) for name in ("writing outside", "reading outside", "symlink out", "local socket", "killing all", "daemon")]


SAME_USER = [(name, [*NAMESPACES, "own user", "landlock"]) for name in ("killing a bystander", "a signal from a pipe", "a signal from a socket", "slowing a bystander", "pinning a bystander", "idling a bystander")]


@pytest.mark.parametrize("name, off", [*WALLS, *SAME_USER, ("fork bomb", ["own user"]), ("fork bomb", ["landlock", "seccomp"]), ("becoming root", ["seccomp"]), ("limits back", ["seccomp"]), ("killing a bystander", [*NAMESPACES, "landlock"]), ("killing a bystander", [*NAMESPACES, "seccomp"])])
@isolated
def test_each_wall_stands_without_the_other(name, off, world):
    source, told = HOSTILE[name]
    verdict = run(world.source(source), timeout=0.5, without=off)
    assert not verdict.passed and re.search(told.replace("1 s", "0.5 s"), verdict.reason), verdict
    assert not set(off) & set(verdict.layers)
    world.unharmed()


@linux
def test_without_any_kernel_protection_orphans_are_found(world):
    verdict = run(world.source(DAEMON), timeout=1, without=LAYERS[2:], isolation="quiet")
    assert verdict.passed and verdict.layers == LAYERS[:2]
    world.unharmed()


SQUARE = "assert f(2) == 4\nassert f(3) == 9, 'SECRET'\n"

LIES = {
    "os._exit": ("import os\ndef f(x): os._exit(0)", r"the solution ended its process \(exit code 0\)"),
    "os._exit at once": ("import os; os._exit(0)", r"the solution ended its process \(exit code 0\)"),
    "sys.exit": ("import sys\ndef f(x): sys.exit(0)", r"the solution ended its process \(exit code 0\)"),
    "exit": ("def f(x): exit()", r"the solution ended its process \(exit code 0\)"),
    "atexit": ("import atexit, os; atexit.register(os._exit, 0)\ndef f(x): raise SystemExit", "the solution ended its process"),
    "patched AssertionError": ("import builtins\nclass E(Exception):\n    def __new__(c, *a): return Exception.__new__(c)\nbuiltins.AssertionError = E\ndef f(x): return 0", "AssertionError"),
    "raises AssertionError": ("def f(x): raise AssertionError()", "AssertionError"),
    "equal to all": ("class A:\n    __eq__ = lambda s, o: True\ndef f(x): return A()", "not plain data: TypeError: a A is not plain data"),
    "int equal to all": ("class A(int):\n    __eq__ = lambda s, o: True\n    __hash__ = int.__hash__\ndef f(x): return A(7)", "AssertionError"),
    "str equal to all": ("class A(str):\n    __eq__ = lambda s, o: True\n    __hash__ = str.__hash__\ndef f(x): return A('a')", "AssertionError"),
    "list equal to all": ("class A(list):\n    __eq__ = lambda s, o: True\ndef f(x): return A()", "AssertionError"),
    "float equal to all": ("class A(float):\n    __eq__ = lambda s, o: True\n    __repr__ = lambda s: '4.0'\ndef f(x): return A(1)", "AssertionError"),
    "lying __class__": ("class A:\n    __class__ = property(lambda s: int)\n    __eq__ = lambda s, o: True\n    def __format__(s, o): return '4'\n    __gt__ = __lt__ = lambda s, o: True\ndef f(x): return A()", "AssertionError|not plain data"),
    "nan": ("def f(x): return float('nan')", "AssertionError"),
    "patched json": ("import json; json.dumps = lambda *a, **k: '[\"l\", \"return\", 4, null]'\ndef f(x): return 0", "AssertionError"),
    "patched len and isinstance": ("import builtins\nbuiltins.len = builtins.isinstance = lambda *a: True\ndef f(x): return 0", "AssertionError|not plain data|ended|RecursionError|TypeError|timed out"),
    "patched marshal": ("import marshal, os\nmarshal.dumps = lambda *a: b'passed'\nos.write = lambda *a: 6\ndef f(x): return 0", "timed out|ended"),
    "forging messages": (OPEN_FILES + "def f(x):\n    for fd in range(64):\n        try: os.write(fd, b'=passed')\n        except OSError: pass\n    os._exit(0)", "not plain data"),
    "forging a huge message": ("import os\nos.write(6, b'\\xff' * 8)\ndef f(x): return 4", "not plain data"),
    "forging an endless message": ("import os\nos.write(6, (1 << 23).to_bytes(4, 'little'))\ndef f(x):\n    while True: os.write(6, b'[' * 65536)", "not plain data"),
    "forging an exception": ("import os, json\ndef f(x):\n    t = json.dumps(['l', 'raise', ['l', ['l', 'SystemExit'], ['l', 0]], None])\n    os.write(6, len(t).to_bytes(4, 'little') + t.encode())", "Exception: 0"),
    "closing the line": ("import os, time\ndef f(x):\n    os.close(6)\n    time.sleep(60)", "the solution closed its line to the tests"),
    "generator": ("def f(x): yield 4", "a generator is not plain data"),
    "None": ("def f(x): pass", "AssertionError"),
    "closure": ("def f(x): return lambda: 4", "a function is not plain data"),
    "cyclic list": ("def f(x):\n    a = []\n    a.append(a)\n    return a", "not plain data: RecursionError"),
    "a deep list": ("import sys\ndef f(x):\n    a = []\n    for _ in range(900): a = [a]\n    return a", "not plain data|AssertionError"),
    "gigabytes": ("def f(x): return 'x' * (20 << 20)", "not plain data"),
    "exception with a lying class": ("class E(Exception):\n    __class__ = property(lambda s: 1/0)\n    args = property(lambda s: 1/0)\ndef f(x): raise E()", "Exception"),
    "exception equal to all": ("class E(Exception):\n    __eq__ = lambda s, o: True\ndef f(x): raise E(4)", "Exception: 4"),
    "KeyboardInterrupt": ("def f(x): raise KeyboardInterrupt", "KeyboardInterrupt|ended"),
    "endless loop": ("def f(x):\n    while True: pass", "timed out after 1 s"),
    "endless loop outside": ("while True: pass", "timed out after 1 s"),
    "endless recursion": ("def f(x): return f(x)", "RecursionError"),
    "memory": ("def f(x): return [0] * (1 << 30)", "MemoryError|memory limit"),
    "segmentation fault": ("import ctypes\ndef f(x): ctypes.string_at(0)", "killed by SIGSEGV"),
    "no function": ("g = 4", "the solution defines no function 'f'"),
    "not a function": ("f = 4", "the solution defines no function 'f'"),
    "no Python": ("def f(x) return 4", "not Python: SyntaxError"),
    "raises on import": ("raise ValueError('early')", "ValueError: early"),
    "huge integer": ("def f(x): return 10 ** 100_000", "AssertionError"),
    "tests in frames": ("import sys, gc\ndef f(x):\n    frame, text = sys._getframe(), ''\n    while frame: text, frame = text + repr(frame.f_locals) + repr(frame.f_globals), frame.f_back\n    text += ''.join(repr(o) for o in gc.get_objects() if type(o) in (dict, list, tuple, str))\n    assert not any(c == 'S' and text.startswith('ECRET', i + 1) for i, c in enumerate(text)), 'seen'\n    raise KeyError('unseen')", "KeyError: 'unseen'"),
    "tests in memory": ("""
import ctypes, os
def f(x):
    libc = ctypes.CDLL(None)
    out, into = os.pipe()
    start, seen = id(object()) & ~0xFFF, 0
    for step in range(-2048, 2048):
        wrote = libc.write(into, ctypes.c_void_p(start + step * 4096), ctypes.c_size_t(4096))
        if wrote > 0:  # where there is nothing to read, -1 and no signal
            seen += 1
            data = os.read(out, wrote)
            assert not any(part.endswith(b'S') for part in data.split(b'ECRET')[:-1]), 'seen'
    raise KeyError('unseen' if seen > 100 else 'no memory read')
""", "KeyError: 'unseen'"),
    "tests in files": ("import os, glob\ndef f(x):\n    for p in glob.glob('/proc/*/cmdline') + glob.glob('/tmp/**', recursive=True):\n        try: assert b'SECR' + b'ET' not in open(p, 'rb').read(), 'seen'\n        except OSError: pass\n    raise KeyError('unseen')", "KeyError: 'unseen'"),
    "tests in descriptors": ("import os\ndef f(x):\n    for fd in range(64):\n        if fd in (1, 2, 5): continue\n        try:\n            os.set_blocking(fd, False)\n            assert b'SECR' not in os.read(fd, 10**6), 'seen'\n        except OSError: pass\n    raise KeyError('unseen')", "KeyError: 'unseen'"),
    "the token": ("import os, sys\ndef f(x):\n    frame = sys._getframe()\n    while 'token' not in frame.f_locals: frame = frame.f_back\n    os.write(3, frame.f_locals['token'])\n    os._exit(0)", "the solution closed its line to the tests"),
    "a fault that says passed": ("import os, json\ndef f(x):\n    t = json.dumps(['l', 'fault', 'passed', None])\n    os.write(6, len(t).to_bytes(4, 'little') + t.encode())", "^said 'passed'"),
    "patching the judge": ("import sys, os\ndef f(x):\n    own = sys._getframe().f_back.f_globals\n    for name in ('_become', '_ending', '_pack', '_send'): own[name] = lambda *a: os.write(3, b'passed')\n    return 4", "timed out after 1 s|not plain data"),
    "tracing the judge": ("import sys\ndef f(x):\n    frame = sys._getframe().f_back\n    def jump(frame, event, arg): frame.f_lineno = frame.f_code.co_firstlineno + 3; return jump\n    frame.f_trace = jump\n    sys.settrace(jump)\n    return 0", "AssertionError|ended|timed out|closed its line|ValueError|not plain data"),
    "a patched int": ("import builtins\nclass A(int):\n    __eq__ = lambda s, o: True\n    __hash__ = int.__hash__\nbuiltins.int = A\ndef f(x): return A(7)", "AssertionError|not plain data"),
    "no end to a loop": ("def f(x): raise StopIteration(4)", "Exception: 4"),
    "killing the tests": ("import os\ndef f(x):\n    for pid in [-1, *range(1, 300)]:\n        if pid != os.getpid():\n            try: os.kill(pid, 9)\n            except OSError: pass\n    return 0", "AssertionError|ended|killed by SIGKILL"),
}


@linux
@pytest.mark.parametrize("name", LIES)
def test_lies(name, world):
    solution, told = LIES[name]
    verdict = judge(world.source(solution), SQUARE, "f", timeout=1)
    assert not verdict.passed and re.search(told, verdict.reason), verdict
    assert "seen" not in verdict.reason.replace("unseen", "")
    world.unharmed()


@linux
@pytest.mark.parametrize("name", ["os._exit", "int equal to all", "forging messages", "tests in frames", "tests in files", "tests in descriptors", "killing the tests", "endless loop", "segmentation fault"])
def test_lies_as_in_a_container_without_namespaces(name, world):
    solution, told = LIES[name]
    verdict = judge(world.source(solution), SQUARE, "f", timeout=1, without=NAMESPACES, isolation="quiet")
    assert not verdict.passed and re.search(told, verdict.reason), verdict
    world.unharmed()


@pytest.mark.parametrize("tests", ["try: f(2)\nexcept BaseException: pass", "try: f(2)\nexcept: pass\ntry: f(3)\nexcept: pass", "def check(candidate):\n    try: candidate(2)\n    except BaseException: return"])
@pytest.mark.parametrize("solution", ["import os\ndef f(x): os._exit(0)", "def f(x): return print", "import os; os.write(6, b'\\x01\\0\\0\\0x')\ndef f(x): return 4"])
def test_a_test_that_catches_everything_hides_no_fault(tests, solution):
    verdict = judge(solution, tests, "f", timeout=1)
    assert not verdict.passed and ("ended" in verdict.reason or "not plain data" in verdict.reason), verdict


@pytest.mark.parametrize("tests", ["assert all(map(f, [1, 2, 3]))", "assert list(map(f, [1, 2])) == []", "assert not any(map(f, [1, 2]))", "for _ in filter(f, [1, 2]): assert False"])
@pytest.mark.parametrize("error", ["StopIteration", "StopAsyncIteration", "type('E', (StopIteration,), {})"])
def test_a_solution_cannot_end_the_tests_loops(tests, error):
    verdict = judge(f"def f(x): raise {error}(7)", tests, "f", timeout=5)
    assert not verdict.passed and verdict.reason.startswith("Exception: 7"), verdict


def test_tests_that_never_call_the_function_prove_nothing():
    for tests in ("assert True", "def check(candidate): pass", "g = f"):
        assert judge("def f(): return 1", tests, "f").reason == "the tests never called f"


HONEST = {
    "nothing": "",
    "recursion": "def f(n): return 0 if n == 0 else 1 + f(n - 1)\nassert f(900) == 900",
    "printing": "for i in range(1000): print(i, 'ä', '☃', '\U0001f40d')",
    "unicode": "größe = 'ß' * 3\nassert größe.upper() == 'SSSSSS' and len('\U0001f40d') == 1",
    "threads": "import threading\nseen = []\nts = [threading.Thread(target=seen.append, args=(i,)) for i in range(4)]\n[t.start() for t in ts]\n[t.join() for t in ts]\nassert sorted(seen) == [0, 1, 2, 3]",
    "a thread left to end by itself": "import threading, time\nthreading.Thread(target=time.sleep, args=(0.1,)).start()",
    "daemon thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    "pool": "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(4) as p: assert list(p.map(abs, [-1, 2])) == [1, 2]",
    "library": "import re, math, collections, itertools, functools, hashlib, random, typing, datetime, heapq, bisect, string, operator, decimal, fractions, statistics, json, copy, enum, dataclasses, zlib, io, uuid, textwrap\n"
               "assert hashlib.md5(b'').hexdigest().startswith('d41d') and re.findall('a+', 'aab') == ['aa'] and random.random() < 1 and datetime.datetime.now().year > 2000 and math.isclose(fractions.Fraction(1, 3), 1/3)",
    "guard": "def main(): print('main')\nif __name__ == '__main__': main()\nelse: raise ImportError",
    "own files": "open('a.txt', 'w').write('a')\nassert open('a.txt').read() == 'a'\nimport tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'a')",
    "dataclass and pickle": "import dataclasses, pickle\n@dataclasses.dataclass\nclass A: x: int\nassert pickle.loads(pickle.dumps(A(1))) == A(1)",
    "asyncio": "import asyncio\nasync def f(): await asyncio.sleep(0.01); return 4\nassert asyncio.run(f()) == 4",
    "a child process": "import os\npid = os.fork()\nif pid == 0: os._exit(3)\nassert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3",
    "memory": "a = bytearray(200 << 20)",
    "output to both": "import sys\nprint('out'); print('err', file=sys.stderr)",
}


@pytest.mark.parametrize("name", HONEST)
@pytest.mark.parametrize("without", [(), NAMESPACES], ids=["all layers", "no namespaces"])
def test_honest(name, without):
    if name == "a child process" and without and os.geteuid() == 0 and "own user" not in run("", without=without, isolation="quiet").layers:
        pytest.skip("root's processes are not counted, and so refused")
    verdict = run(HONEST[name], timeout=5, without=without, isolation="quiet")
    assert verdict.passed and verdict.reason == "passed", verdict
    assert sorted(verdict.output.split()) == {"guard": ["main"], "output to both": ["err", "out"]}.get(name, sorted(verdict.output.split()))


RIGHT = {
    "containers": ("from collections import *\ndef f(x): return Counter(x), OrderedDict(a=1), namedtuple('P', 'x y')(1, 2), {1}, frozenset('a'), b'b', None", "assert f('aab') == ({'a': 2, 'b': 1}, {'a': 1}, (1, 2), {1}, frozenset('a'), b'b', None)"),
    "numbers": ("def f(x): return x", "for x in (0, -1, 10**5000, 0.1, float('inf'), 1j, True):\n    y = f(x)\n    assert y == x and type(y) is type(x)\nassert f(float('nan')) != f(float('nan'))"),
    "text": ("def f(x): return x[::-1]", "assert f('aä\\udc80\\0') == '\\0\\udc80äa'"),
    "changed arguments": ("def f(x, d): x.sort(); d['a'][0] += 1", "a, b = [3, 1, 2], [1]\nassert f(a, d={'a': b}) is None\nassert a == [1, 2, 3] and b == [2]"),
    "exceptions": ("class MyError(KeyError): pass\ndef f(x):\n    if x: raise MyError('a', 1)\n    return 1 / x", "try: f(1)\nexcept KeyError as e: assert type(e) is KeyError and e.args == ('a', 1)\ntry: f(0)\nexcept ZeroDivisionError: pass\nelse: assert False"),
    "state": ("n = 0\ndef f():\n    global n\n    n += 1\n    return n", "assert [f() for _ in range(500)] == list(range(1, 501))"),
    "large": ("def f(x): return x", "x = list(range(100_000))\nassert f(x) == x"),
    "check": ("def f(x): return x", "def check(candidate):\n    assert candidate(4) == 4 and candidate.__name__ == 'f'"),
    "prints": ("def f(x): print('hello'); return x", "assert f(1) == 1"),
    "prints, and is still at work when the tests end": ("import threading, time\ndef f(x):\n    print('hello')\n    threading.Thread(target=time.sleep, args=(2,)).start()\n    return x", "assert f(1) == 1"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_solutions_pass(name):
    verdict = judge(*RIGHT[name], "f", timeout=5)
    assert verdict.passed, verdict
    assert (verdict.output == "hello\n") == name.startswith("prints")


def test_prelude_is_known_to_both_sides():
    prelude = "from typing import List\ndef twice(x): return 2 * x\ndef f(x: List[int]):\n    'doubles'\n"
    tests = "assert f([1]) == [twice(1)]"
    assert judge("def f(x: List[int]): return [twice(i) for i in x]", tests, "f", prelude).passed
    assert not judge("def twice(x): return 7\ndef f(x): return [twice(1)]", tests, "f", prelude).passed
    assert judge("def f(x): return 1", "assert f(1)", "f", "1/0").reason.startswith("ZeroDivisionError")


@pytest.mark.parametrize("arguments, told", [(dict(tests="a = = 1"), "tests is not Python"), (dict(prelude="def f("), "prelude is not Python"), (dict(tests=None), "tests is a NoneType"), (dict(solution=None), "program is a NoneType"),
                                             (dict(entry_point="a.b"), "entry_point='a.b'"), (dict(entry_point="def"), "entry_point='def'"), (dict(timeout=-1), "timeout=-1"), (dict(timeout=float("nan")), "timeout=nan"),
                                             (dict(isolation="requires"), "did you mean 'require'"), (dict(memory_gb=1), "memory_mb"), (dict(without=["landlok"]), "landlock")])
def test_wrong_arguments_are_named(arguments, told):
    with pytest.raises(ValueError) as error:
        judge(**{**dict(solution="def f(): return 1", tests="assert f()", entry_point="f"), **arguments})
    assert told in str(error.value), error.value


def test_many_do_not_mix():
    jobs = [f"print({i})\nopen('a', 'x').close()\nassert {i} % 3" for i in range(30)]
    verdicts = run_many(jobs, workers=8, progress=False)
    assert [v.output for v in verdicts] == [f"{i}\n" for i in range(30)]
    assert [v.passed for v in verdicts] == [bool(i % 3) for i in range(30)]


def test_from_many_threads_beside_torch():
    import torch
    stop = threading.Event()
    busy = threading.Thread(target=lambda: [torch.randn(200, 200) @ torch.randn(200, 200) for _ in iter(stop.is_set, True)])
    busy.start()
    with ThreadPoolExecutor(6) as pool:
        verdicts = list(pool.map(lambda i: judge(f"def f(): return {i}", f"assert f() == {i}", "f", timeout=10), range(18)))
    stop.set()
    busy.join()
    assert all(v.passed for v in verdicts), verdicts


@linux
def test_interruption_leaves_nothing(world):
    job = dict(program=world.source("import time; time.sleep(60)"), timeout=60.0)
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)  # which a parent under nohup ignores for its children\nfrom gcpo.sandbox import run_many\nrun_many([{job!r}] * 6, workers=3)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for end, told in ((signal.SIGINT, "KeyboardInterrupt"), (signal.SIGKILL, "")):
        if end == signal.SIGKILL:
            process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        waited = time.monotonic()
        while len(named(world.mark)) < 3 and time.monotonic() - waited < 30:
            time.sleep(0.05)
        assert len(named(world.mark)) == 3
        process.send_signal(end)
        assert told in process.communicate(timeout=20)[1]
        waited = time.monotonic()
        while named(world.mark) and time.monotonic() - waited < 5:
            time.sleep(0.05)
        assert not named(world.mark)


@linux
def test_a_killed_launcher_is_the_sandboxs_fault_and_leaves_nothing(world):
    caught = []
    def call():
        try: run(world.source("import time; time.sleep(60)"), timeout=60)
        except SandboxError as error: caught.append(error)
    thread = threading.Thread(target=call)
    thread.start()
    while not named(world.mark):
        time.sleep(0.02)
    for child in Path("/proc/self/task").glob("*/children"):
        for pid in child.read_text().split():
            if int(pid) != world.bystander.pid:
                os.kill(int(pid), signal.SIGKILL)
    thread.join()
    assert "no output" in str(caught[0])
    time.sleep(0.1)
    world.unharmed()


def test_what_is_missing_is_refused_or_warned_of_once(monkeypatch):
    bare = LAYERS[2:]
    with pytest.raises(SandboxError, match="no protection of files .* Remedy: .* isolation='best'"):
        run("print('ran')", isolation="require", without=bare)
    monkeypatch.setattr(sandbox, "_warned", threading.Event())
    with pytest.warns(UserWarning, match="no protection of network .*isolation='quiet'"):
        assert run("", without=bare).passed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run("", without=bare).passed and run("", without=bare, isolation="quiet").passed


@isolated
def test_require_is_content_here():
    assert run("", isolation="require").passed and run("", isolation="require", without=NAMESPACES).passed
    assert {"pid namespace", "file system view", "network namespace", "limits", "seccomp"} <= set(run("").layers)


@isolated
def test_the_view_holds_python_and_nothing_else():
    packages = "[p for d in sys.path if os.path.isdir(d) for p in os.listdir(d) if p in ('site-packages', 'dist-packages') and os.listdir(os.path.join(d, p))]"
    top, here, where, packed = eval(run(f"import os, sys\nprint([os.listdir('/'), os.listdir(), os.getcwd(), {packages}])", without=["landlock"]).output)
    assert not {"proc", "sys", "home", "etc", "var", "mnt", "opt"} & set(top) - {sys.base_prefix.split("/")[1]}, top
    assert (here, where, packed) == ([], "/tmp", [])


@linux
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user to try")
@pytest.mark.parametrize("without", [(), NAMESPACES], ids=["user namespace", "no namespaces"])
def test_as_another_user(without, request):
    python = shutil.which("python3", path="/usr/bin") or pytest.skip("no system Python that other users may start")
    home = Path(tempfile.mkdtemp())
    request.addfinalizer(lambda: shutil.rmtree(home))
    module = home / "gcpo"
    module.mkdir()
    (module / "__init__.py").write_text("")
    source = (ROOT / "gcpo" / "sandbox.py").read_text().replace("from tqdm.auto import tqdm", "tqdm = None").replace("from .core import choose, nearest", "choose = nearest = lambda *a: ''")
    (module / "sandbox.py").write_text(source)
    for path in (home, module, *module.iterdir()):
        path.chmod(0o755)
    code = f"""
import sys, os, json
sys.path.insert(0, {str(home)!r})
from gcpo.sandbox import run, judge, layers
w = dict(without={without!r}, isolation='quiet')
parent = os.getpid()
bomb = "import os\\nwhile True:\\n    try: os.fork()\\n    except OSError: pass"
done = [run('print(4)', **w), run(f'import os; os.kill({{parent}}, 9)', **w), run('import os; os.kill(-1, 9); 1/0', **w), run(bomb, timeout=1, **w),
        judge('def f(x): return x', 'assert f(3) == 3', 'f', **w), run(f"open('/proc/{{parent}}/environ').read()", **w),
        run('import threading, time\\nts = [threading.Thread(target=time.sleep, args=(.1,)) for _ in range(4)]\\n[t.start() for t in ts]', **w)]
print(json.dumps([[v.passed, v.reason, v.layers] for v in done]))
"""
    told = subprocess.run([python, "-I", "-c", code], user=65534, group=65534, extra_groups=[], cwd="/", capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    verdicts = json.loads(told.stdout)
    if not without and "user namespace" not in verdicts[0][2]:
        pytest.skip("no user namespaces for other users here")
    assert [v[0] for v in verdicts] == [True, False, False, False, True, False, True], verdicts
    assert verdicts[3][1] == "timed out after 1 s" and "Error" in verdicts[1][1] and "Error" in verdicts[5][1]
    if not without:
        assert {"user namespace", "pid namespace", "file system view", "network namespace", "landlock", "seccomp"} <= set(verdicts[0][2])


@linux
def test_a_python_that_does_not_start_is_told(monkeypatch):
    monkeypatch.setattr(sandbox, "_BOOT", "print('broken')")
    with pytest.raises(SandboxError, match="the launcher failed: broken"):
        run("")
