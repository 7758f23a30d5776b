"""The inside of the sandbox: a small server that starts every program in fresh namespaces, and the driver that runs it.

Run as a script by `sandbox`, which holds the other ends of all pipes; imports the standard library only, and little of
it, because starting it is what a cold run costs. It knows neither tests nor expected outputs.

    serve   pid 1 of its own user, pid, mount, net, ipc, uts and cgroup namespaces, on a read-only root. For each run it
            receives five file descriptors and the limits, nothing else: program and inputs never pass through its
            memory, so that a program finds no trace of an earlier one. It watches memory and processes, and kills when
            told to.
      |
      fork  pid 1 of a fresh pid namespace (its end is the end of all it started), fresh mount and ipc namespaces, its
            own sized tmpfs, another user without capabilities, no_new_privs, rlimits, a seccomp filter.
            Then the program runs in it: fds 0-2 are its own, 3 brings the program and then one call at a time, 4 takes
            the replies. A reply is only a claim: forging one gains nothing without knowing the right output.
"""

import ctypes
import gc
import marshal
import os
import resource
import select
import struct
import sys

try:
    from _json import encode_basestring_ascii as quote  # the module json takes 6 ms to import
except ImportError:
    from json.encoder import encode_basestring_ascii as quote

HEADER = struct.Struct("<QQQ")  # memory bytes, processes, disk bytes: the limits of one run
REPORT = struct.Struct("<i8sd")  # wait status, what was exceeded ("" if nothing), CPU seconds used
SETUP_FAILED = b"setup"  # as what was exceeded: our failure, not the program's
PACKAGES = "/packages"
INSIDE_ID = 1000  # user and group of the program inside
PRELOAD = (
    "types", "re", "math", "random", "collections", "itertools", "functools", "heapq", "bisect", "string",
    "typing", "operator", "copy", "threading", "traceback", "json", "datetime", "decimal", "fractions",
)  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)
NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)  # fmt: skip
RDONLY, NOSUID, NODEV, NOEXEC, BIND, REC, SLAVE = 1, 2, 4, 8, 4096, 16384, 1 << 19
DETACH = 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38


# -- plain data across the wall ----------------------------------------------------------------------------------


def encode(value):
    """Plain Python data as JSON text. Subclasses are read as the plain value they wrap, by the base class's methods,
    so that no method of theirs has a say. What JSON lacks is tagged: {"~": "tuple", "v": [...]}.
    Raises TypeError for what is not plain data.
    """
    kind = type(value)
    if value is None or kind is bool:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        value = int.__add__(value, 0)
        return int.__repr__(value) if -(1 << 63) <= value < 1 << 64 else _tagged("int", f'"{value:x}"')
    if isinstance(value, float):
        text = float.__repr__(float.__pos__(value))
        return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(text, text)
    if isinstance(value, str):
        return quote(str.__str__(value))
    if isinstance(value, list):
        return f"[{','.join([encode(part) for part in list.__iter__(value)])}]"
    if isinstance(value, dict):
        pairs = [(encode(key), encode(part)) for key, part in dict.items(value)]
        if all(key[0] == '"' and key != '"~"' for key, _ in pairs):
            return f"{{{','.join([f'{key}:{part}' for key, part in pairs])}}}"
        return _tagged("dict", f"[{','.join([f'[{key},{part}]' for key, part in pairs])}]")
    for base in (tuple, set, frozenset):
        if isinstance(value, base):
            return _tagged(base.__name__, f"[{','.join([encode(part) for part in base.__iter__(value)])}]")
    if isinstance(value, bytes):
        return _tagged("bytes", f'"{bytes.hex(value)}"')
    if isinstance(value, complex):
        value = complex.__add__(value, 0j)
        return _tagged("complex", f"[{encode(value.real)},{encode(value.imag)}]")
    if hasattr(kind, "tolist"):  # numpy's arrays and numbers
        return encode(value.tolist())
    raise TypeError(f"{kind.__name__} is not plain data")


def _tagged(kind, text):
    return f'{{"~":"{kind}","v":{text}}}'


def decode(data):
    """Plain data from what `json.loads` makes of `encode`'s text. Raises ValueError, TypeError or KeyError on other."""
    if isinstance(data, list):
        return [decode(part) for part in data]
    if not isinstance(data, dict):
        return data
    if "~" not in data:
        return {key: decode(part) for key, part in data.items()}
    kind, content = data["~"], data["v"]
    if kind == "int":
        return int(content, 16)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "dict":
        return {decode(key): decode(part) for key, part in content}
    if kind == "complex":
        return complex(*content)
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](decode(part) for part in content)


# -- the program -------------------------------------------------------------------------------------------------


def _drive():
    """Run the program that comes in by fd 3. Never returns."""
    order = _request()
    sys.argv = ["program.py"]
    if "random" in sys.modules:
        sys.modules["random"].seed(0)  # programs that toss coins get the same verdict each time
    if order["mode"] == "stdio":
        os.closerange(3, 5)
        _as_script(order["code"])
    else:
        _as_function(order["code"], order["entry_point"])


def _namespace(name):
    """A fresh module to run the program in, with `exit` and `quit`, which -S leaves out."""
    import builtins
    import types

    builtins.exit = builtins.quit = sys.exit
    module = types.ModuleType(name)
    sys.modules[name] = sys.modules["__main__"] = module
    return vars(module)


def _as_script(code):
    status = 0
    try:
        exec(compile(code, "program.py", "exec", dont_inherit=True), _namespace("__main__"))
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()  # as the interpreter does: wait for threads that are no daemons
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if status and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        status = 1
        error = error.with_traceback(error.__traceback__.tb_next)  # without our own frame
        sys.excepthook(type(error), error, error.__traceback__)
    try:
        import atexit

        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        status = status or 120  # what Python exits with when its output cannot be flushed
    os._exit(status & 255)


def _as_function(code, entry_point):
    def reply(text):
        data = text.encode() + b"\n"
        while data:
            data = data[os.write(4, data) :]

    try:
        names = _namespace("solution")
        exec(compile(code, "program.py", "exec", dont_inherit=True), names)
        if entry_point not in names:
            raise NameError(f"the program defines no {entry_point}")
        function = names[entry_point]
        reply('{"value":null}')
    except BaseException as error:
        reply(_trouble(error))
        os._exit(1)
    while call := _request():
        try:
            reply(f'{{"value":{encode(function(*call["args"], **call["kwargs"]))}}}')
        except BaseException as error:
            reply(_trouble(error))
    os._exit(0)


def _trouble(error):
    return f'{{"error":{quote(f"{type(error).__name__}: {error}"[:300])}}}'


def _request():
    """The next message on fd 3, which comes from the trusted side; None when there are no more."""
    size = _exactly(4)
    return marshal.loads(_exactly(int.from_bytes(size, "big"))) if size else None


def _exactly(size):
    data = b""
    while len(data) < size:
        part = os.read(3, min(size - len(data), 1 << 20))
        if not part:
            return b""
        data += part
    return data


# -- walls -------------------------------------------------------------------------------------------------------


def _check(result, what):
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _unshare(flags):
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def _mount(source, target, kind=None, flags=0, data=None):
    text = [None if part is None else str(part).encode() for part in (source, target, kind, data)]
    _check(_libc.mount(text[0], text[1], text[2], ctypes.c_ulong(flags), text[3]), f"mount {target}")


def _prctl(option, value=0):
    return _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def enter_namespaces():
    """Go on as pid 1 of new namespaces of every kind, with all capabilities inside them and none outside.

    Returns the user of the programs: INSIDE_ID where root maps an own number for them, else 0 for "no other".
    """
    uid, gid, me = os.geteuid(), os.getegid(), os.getpid()
    go_read, go_write = os.pipe()
    mapper = os.fork()
    if mapper == 0:  # maps come from outside the new user namespace: only there may root give away further ids
        os.close(go_write)
        os.read(go_read, 1)
        os._exit(0 if uid == 0 and _map_two(me) else 1)
    _unshare(NEWUSER | NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS | NEWCGROUP)
    os.close(go_write)
    os.close(go_read)
    two = os.waitpid(mapper, 0)[1] == 0
    if not two:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{INSIDE_ID} {uid} 1")
        _write("/proc/self/gid_map", f"{INSIDE_ID} {gid} 1")
    alive_read, alive_write = os.pipe()
    child = os.fork()
    if child:
        os.closerange(3, alive_write)
        os.closerange(alive_write + 1, 64)
        os.waitpid(child, 0)
        os._exit(0)
    os.close(alive_write)
    if two:
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
    _prctl(PR_SET_PDEATHSIG, 9)
    if select.select([alive_read], [], [], 0)[0]:
        os._exit(0)  # the parent died before the call above
    os.close(alive_read)
    return INSIDE_ID if two else 0


def _map_two(pid):
    """Root inside is root outside; the programs' user is a number of their own, so that process limits hold for it."""
    other = 2_000_000_000 + pid
    try:
        _write(f"/proc/{pid}/uid_map", f"0 0 1\n{INSIDE_ID} {other} 1")
        _write(f"/proc/{pid}/gid_map", f"0 0 1\n{INSIDE_ID} {other} 1")
        return True
    except OSError:
        return False


def _write(path, text):
    with open(path, "w") as file:
        file.write(text)


def readable_paths():
    """What of the system a program may read: the libraries, the commands and the standard library."""
    prefix = os.path.realpath(sys.base_prefix)
    paths = ["/usr/bin", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache"]
    paths += [os.path.join(prefix, "lib")] if os.path.join(prefix, "lib") not in paths else []
    return [path for path in paths if os.path.exists(path)]


def hidden_paths():
    """Installed packages: among them may be benchmarks with their answers."""
    folders = [f"{path}/{name}" for path in readable_paths() if path.endswith("lib") for name in os.listdir(path)]
    pythons = [folder for folder in folders if os.path.basename(folder).startswith("python3")]
    found = [f"{folder}/{kind}-packages" for folder in pythons for kind in ("site", "dist")]
    return [path for path in found if os.path.isdir(path) and not os.path.islink(path)]


def build_root(packages):
    """A read-only root with nothing but `readable_paths`, the `packages`, a few devices and an empty /tmp. Returns fds
    of /proc and of the pid namespace; /proc itself is not in the root.
    """
    pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    hidden = hidden_paths()
    _mount(None, "/", flags=REC | SLAVE)
    root = "/sys"  # any directory that holds nothing needed below
    _mount("tmpfs", root, "tmpfs", NOSUID, "size=1m,mode=755")
    seen = [(path, path) for path in readable_paths()]
    seen += [(path, f"{PACKAGES}/{os.path.basename(path)}") for path in packages]
    for path, place in seen:
        _place(path, root + place)
        _mount(path, root + place, flags=BIND | REC)
        _read_only(root + place)
    for path in hidden:
        _mount("tmpfs", root + path, "tmpfs", NOSUID | NODEV | RDONLY, "size=4k,mode=755")
    for path in ("/bin", "/lib", "/lib64"):
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
        elif os.path.isdir(path):
            _place(path, root + path)
            _mount(path, root + path, flags=BIND | REC)
            _read_only(root + path)
    for device in ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"):
        _place(device, root + device)
        _mount(device, root + device, flags=BIND)
    os.symlink("/tmp", root + "/dev/shm")
    os.mkdir(root + "/tmp")
    os.mkdir(root + "/proc")
    try:
        _mount("proc", root + "/proc", "proc", NOSUID | NODEV | NOEXEC)
        proc = os.open(root + "/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        _check(_libc.umount2((root + "/proc").encode(), DETACH), "umount /proc")
    except OSError:
        proc = None  # masked by a container: then rlimits alone bound memory and processes
    try:
        _write("/proc/sys/user/max_user_namespaces", "0")
    except OSError:
        pass  # read-only in a container: the seccomp filter refuses new namespaces too
    os.chdir(root)
    number = {"x86_64": 155, "aarch64": 41}[os.uname().machine]
    _check(_libc.syscall(ctypes.c_long(number), b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", DETACH), "umount the old root")
    os.chdir("/")
    _read_only("/", recursive=False)
    return proc, pid_namespace


def _place(source, target):
    """An empty directory or file to mount on."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))


def _read_only(path, recursive=True):
    attributes = struct.pack("<QQQQ", 1 | 2 | (4 if recursive else 0), 0, 0, 0)  # rdonly, nosuid, nodev
    flags = 0x8000 if recursive else 0  # AT_RECURSIVE
    mount_setattr = 442  # on every architecture
    _check(
        _libc.syscall(ctypes.c_long(mount_setattr), -100, path.encode(), flags, attributes, ctypes.c_size_t(32)),
        f"mount_setattr {path}",
    )


def _seccomp_filter():
    """A filter that refuses what no program under test needs: tracing, keyrings and vsock (which no namespace holds),
    new namespaces, mounts, io_uring, bpf, memory that belongs to no process. Returns b"" for a machine whose numbers
    are not written down here.
    """
    if os.uname().machine != "x86_64":
        return b""
    refused = (
        101, 310, 311, 312, 440,  # ptrace, process_vm_readv, process_vm_writev, kcmp, process_madvise
        248, 249, 250,  # add_key, request_key, keyctl
        272, 308, 155, 161, 165, 166, 428, 429, 430, 431, 432, 433, 442,  # unshare, setns, roots and mounts
        298, 321, 323, 425, 426, 427,  # perf_event_open, bpf, userfaultfd, io_uring
        319, 447, 29, 30, 31, 64, 68, 69, 70, 71, 240, 241,  # memfd, shm, sem, msg, mq: memory outside any process
        169, 175, 176, 313, 246, 320, 167, 168, 172, 173, 135, 103,  # reboot, modules, kexec, swap, ports, personality
    )  # fmt: skip
    load, equal, at_least, any_bit, say = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, absent, no_family = 0x7FFF0000, 0x00050001, 0x00050026, 0x00050061  # EPERM, ENOSYS, EAFNOSUPPORT
    new_namespaces = NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET
    count = len(refused)
    code = [
        (load, 0, 0, 4), (equal, 1, 0, 0xC000003E), (say, 0, 0, 0x80000000),  # kill what is not x86-64
        (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (say, 0, 0, absent),  # no x32
        (equal, 0, 1, 435), (say, 0, 0, absent),  # clone3: libc then uses clone, whose flags can be read
        (equal, 0, 4, 56), (load, 0, 0, 16), (any_bit, 0, 1, new_namespaces), (say, 0, 0, refuse), (say, 0, 0, allow),
        (equal, 0, 6, 41), (load, 0, 0, 16), (equal, 3, 0, 1), (equal, 2, 0, 2), (equal, 1, 0, 10),  # socket: the
        (say, 0, 0, no_family), (say, 0, 0, allow),  # families unix, inet and inet6, which the namespace holds
        *((equal, count - i, 0, number) for i, number in enumerate(refused)),
        (say, 0, 0, allow), (say, 0, 0, refuse),
    ]  # fmt: skip
    return b"".join(struct.pack("<HBBI", *line) for line in code)


def _install(filter_bytes):
    buffer = ctypes.create_string_buffer(filter_bytes, len(filter_bytes))
    program = struct.pack("<HxxxxxxQ", len(filter_bytes) // 8, ctypes.addressof(buffer))
    _check(_libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(2), program, 0, 0), "seccomp")


def _drop_everything(user):
    if user:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    capset = {"x86_64": 126, "aarch64": 91}[os.uname().machine]
    _check(_libc.syscall(ctypes.c_long(capset), struct.pack("<Ii", 0x20080522, 0), bytes(24)), "capset")
    _check(_prctl(PR_SET_NO_NEW_PRIVS, 1), "no_new_privs")


def _limit(memory, processes, disk):
    for what, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_FSIZE, disk),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


# -- the server --------------------------------------------------------------------------------------------------


def serve(level, control_fd, packages):
    """Start runs as told until the control socket closes. `level` is how much of a wall there is (see `sandbox`),
    `packages` are folders of installed packages that programs may import.
    """
    import _socket

    control = _socket.socket(fileno=control_fd)
    user, proc, pid_namespace = 0, None, None
    if level == "namespaces":
        user = enter_namespaces()
        proc, pid_namespace = build_root(packages)
    elif level == "bubblewrap":
        proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    if level == "namespaces":
        for capability in range(64):
            if _prctl(PR_CAPBSET_DROP, capability) == -1:
                break
    walls = (level, user, pid_namespace, _seccomp_filter() if level != "none" else b"")
    sys.path += [PACKAGES] if level != "none" else {os.path.dirname(path): 0 for path in packages}
    control.send(b"ready")
    compile("0", "", "exec")  # makes the syntax classes: a millisecond that each fork would spend anew
    wanted = iter(PRELOAD)
    while True:
        while not select.select([control], [], [], 0)[0] and (name := next(wanted, None)):
            __import__(name)  # while there is nothing to do: a cold run does not wait for it
        gc.freeze()  # a collection in a fork would touch, and so copy, every page
        data, ancillary, _, _ = control.recvmsg(HEADER.size, _socket.CMSG_LEN(5 * 4))
        if not data:
            os._exit(0)
        if len(data) != HEADER.size:
            continue  # a kill that came after the run had ended
        fds = struct.unpack("5i", ancillary[0][2])
        limits = HEADER.unpack(data)
        pid, trouble = _fork_run(walls, fds, limits)
        for fd in fds:
            os.close(fd)
        control.send(_watch(control, pid, trouble, proc, limits, once=level == "bubblewrap"))
        if level == "bubblewrap":
            os._exit(0)  # its namespaces hold for one run


def _fork_run(walls, fds, limits):
    """Start the program. Returns its pid and what went wrong in setting it up, or b""."""
    level, user, pid_namespace, filter_bytes = walls
    told, tell = os.pipe()
    if pid_namespace is not None:
        _unshare(NEWPID)
    pid = os.fork()
    if pid == 0:
        try:
            above = [os.dup2(fd, 100 + place) for place, fd in enumerate([*fds, tell])]  # out of the way of 0 to 5
            for place, fd in enumerate(above):
                os.dup2(fd, place)
            os.closerange(6, 1 << 20)
            _enclose(level, user, filter_bytes, limits)
            os.write(5, b"ok")
        except BaseException as error:
            os.write(5, repr(error).encode()[:400])
            os._exit(1)
        os.close(5)
        _drive()
    if pid_namespace is not None:
        _check(_libc.setns(pid_namespace, NEWPID), "setns")
    os.close(tell)
    said = os.read(told, 400)
    os.close(told)
    return pid, b"" if said == b"ok" else said or b"it died"


def _enclose(level, user, filter_bytes, limits):
    if level == "namespaces":
        _unshare(NEWNS | NEWIPC)
        owner = f",uid={user},gid={user}" if user else ""
        _mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, f"size={limits[2]},nr_inodes=4096,mode=700{owner}")
    elif level == "none":
        os.setsid()
        _prctl(PR_SET_PDEATHSIG, 9)
    os.chdir("/tmp")
    _limit(*limits)
    if level != "none":
        _drop_everything(user)
    if filter_bytes:
        _install(filter_bytes)


def _watch(control, pid, trouble, proc, limits, once):
    """Wait for the end of a run, and bring it about where it exceeds its limits or the other side says so.

    With `once` this server ends with the run, which ends all the processes there are.
    """
    exceeded = SETUP_FAILED if trouble else b""
    ended = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(control, select.POLLIN)
    while True:
        ready = [fd for fd, _ in poll.poll(10)]
        if ended in ready:
            break
        if control.fileno() in ready:
            if not control.recv(64):
                os._exit(0)  # the other side is gone
            exceeded = exceeded or b"killed"
        exceeded = exceeded or _excess(proc, limits)
        if exceeded and once:
            return REPORT.pack(9, exceeded, 0.0) + trouble
        if exceeded:
            os.kill(pid, 9)
            if proc is None:
                _kill_group(pid)
    os.close(ended)
    _, status, usage = os.wait4(pid, 0)
    if proc is None:
        _kill_group(pid)
    return REPORT.pack(status, exceeded, usage.ru_utime + usage.ru_stime) + trouble


def _excess(proc, limits):
    """What the processes of the run take together, against the limits: b"memory", b"procs" or b""."""
    if proc is None:
        return b""
    resident = count = 0
    for name in os.listdir(proc):
        if name.isdigit() and int(name) not in (1, os.getpid()):
            try:
                fd = os.open(f"{name}/statm", os.O_RDONLY, dir_fd=proc)
                resident += int(os.read(fd, 200).split()[1])
                os.close(fd)
                count += 1
            except (OSError, IndexError):
                pass  # it ended just now
    if resident * resource.getpagesize() > limits[0]:
        return b"memory"
    return b"procs" if count > limits[1] else b""


def _kill_group(pid):
    try:
        os.killpg(pid, 9)
    except (ProcessLookupError, PermissionError):
        pass


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
