"""Two hosts on one machine: each has its own network, host name, process table and shared memory, and an sshd.

They share the file system, as nodes of a cluster share theirs, but for folders that a test gives to one of them alone.
A cable joins them, eth0 on both sides, which can be cut and mended. Each lives as long as its first process, and that
one reads from a pipe: however the process that made them ends, theirs end, and network and mounts go with them.
"""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.launching import DEEPSPEED, ROOT

TOOLS = {"pdsh": "pdsh", "sshd": "openssh-server", "ssh": "openssh-server", "ip": "iproute2"}
"""And the Debian package of each."""
ISOLATED = ("unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
ISOLATED += ("--propagation", "private")
PORT = 29500
"""Of the rendezvous: nobody else listens in a network that is new."""
CACHES = ("TORCH_EXTENSIONS_DIR", "HF_HOME")


@functools.cache
def why_not() -> str | None:
    """Why there can be no two hosts here; None: there can."""
    path = f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin{os.pathsep}/sbin"
    missing = sorted({package for tool, package in TOOLS.items() if not shutil.which(tool, path=path)})
    if missing:
        return f"two hosts need {', '.join(missing)}, which is not installed"
    try:
        done = subprocess.run([*ISOLATED, "mount", "-t", "tmpfs", "tmpfs", "/run"], capture_output=True, text=True)
    except OSError as error:
        return f"two hosts need unshare ({error.strerror})"
    return f"namespaces are not allowed here: {done.stderr.strip()}" if done.returncode else None


@dataclass(frozen=True)
class Host:
    """A running one."""

    name: str
    address: str
    process: subprocess.Popen
    """Outside of it; its first process, number 1 in there, is the only child."""

    @property
    def first(self) -> psutil.Process:
        return psutil.Process(self.process.pid).children()[0]

    def inside(self, command: Sequence) -> list[str]:
        """`command`, as it is started from outside to run there."""
        into = ("nsenter", "--target", str(self.first.pid), "--net", "--uts", "--ipc", "--mount", "--pid")
        return [*into, f"--wd={Path.cwd()}", "--", *map(str, command)]

    @contextmanager
    def own_disk(self, place: Path, source: Path) -> Iterator[None]:
        """Inside, `place` is a folder of this host alone, and what lies there is what lies in `source`."""
        subprocess.run(self.inside(["mount", "--bind", source, place]), check=True)
        try:
            yield
        finally:
            subprocess.run(self.inside(["umount", "--lazy", place]), check=True)

    def ranks(self) -> list[psutil.Process]:
        """Those that run there, as the launchers that sshd started made them."""
        return [process for process in self.first.children(recursive=True) if _is_rank(process)]


class TwoHosts:
    """A context. `alpha` is where a person would type the commands.

    Args:
        folder: for keys, configurations and logs.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.hosts: list[Host] = []

    def __enter__(self) -> TwoHosts:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._write_configuration()
            for number, name in enumerate(("alpha", "beta"), start=1):
                self.hosts.append(self._start(name, f"10.0.0.{number}"))
            self._join()
            for host in self.hosts:
                self._wait_for_sshd(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        for host in self.hosts:
            host.process.stdin.close()
            try:
                host.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                host.process.kill()  # and, by --kill-child, the first process of the host with all others
                host.process.wait()
        self.hosts.clear()

    @property
    def alpha(self) -> Host:
        return self.hosts[0]

    @property
    def beta(self) -> Host:
        return self.hosts[1]

    def start(self, script: str | Path, *arguments, cwd: Path = ROOT, log: Path, **environment) -> subprocess.Popen:
        """`deepspeed --hostfile hosts SCRIPT ARGUMENTS` on alpha, one rank on each host, by pdsh and ssh.

        Args:
            environment: of the ranks, told in the file that DeepSpeed reads it from.
        """
        exported = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **{name: os.environ[name] for name in CACHES if name in os.environ},
            **environment,
        }
        (self.folder / "environment").write_text("".join(f"{name}={value}\n" for name, value in exported.items()))
        own = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "MASTER_PORT", "RANK")}
        own |= {
            "PATH": exported["PATH"],
            "DS_ENV_FILE": str(self.folder / "environment"),
            "PDSH_SSH_ARGS_APPEND": f"-F {self.folder / 'ssh_config'}",
        }
        command = [DEEPSPEED, "--hostfile", self.folder / "hosts", "--launcher", "pdsh", "--no_ssh_check"]
        command += ["--master_addr", self.alpha.address, "--master_port", PORT, script, *arguments]
        there = f"cd {shlex.quote(str(cwd))} && exec {shlex.join(map(str, command))}"
        with log.open("a") as opened:
            return subprocess.Popen(
                self.alpha.inside(["sh", "-c", there]), env=own, stdout=opened, stderr=subprocess.STDOUT
            )

    def cut(self) -> None:
        """The cable, at beta's end."""
        self._link("down")

    def mend(self) -> None:
        self._link("up")

    def _link(self, state: str) -> None:
        subprocess.run(self.beta.inside(["ip", "link", "set", "eth0", state]), check=True)

    def _write_configuration(self) -> None:
        for key in ("host_key", "user_key"):
            file = self.folder / key
            if not file.exists():
                subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", file], check=True)
        (self.folder / "sshd_config").write_text(
            f"HostKey {self.folder / 'host_key'}\nAuthorizedKeysFile {self.folder / 'user_key.pub'}\n"
            "StrictModes no\nUsePAM no\nUseDNS no\nPermitRootLogin yes\nPasswordAuthentication no\nPidFile none\n"
        )
        # ServerAlive: or ssh would wait for a host that is cut off as long as TCP does, and the launcher with it.
        (self.folder / "ssh_config").write_text(
            f"Host *\nIdentityFile {self.folder / 'user_key'}\nIdentitiesOnly yes\nStrictHostKeyChecking no\n"
            f"UserKnownHostsFile /dev/null\nLogLevel ERROR\nServerAliveInterval 3\nServerAliveCountMax 2\n"
        )
        (self.folder / "hosts").write_text("alpha slots=1\nbeta slots=1\n")
        (self.folder / "etc_hosts").write_text("127.0.0.1 localhost\n10.0.0.1 alpha\n10.0.0.2 beta\n")
        (self.folder / "resolv.conf").write_text("")  # or each look-up would wait for servers that aren't there

    def _start(self, name: str, address: str) -> Host:
        """A host without a cable yet."""
        script = ["set -e", f"hostname {name}", "mount -t tmpfs tmpfs /run", "mkdir /run/sshd"]
        script += ["mount -t tmpfs tmpfs /dev/shm", "ip link set lo up"]
        script += [f"mount --bind {self.folder / 'etc_hosts'} /etc/hosts"]
        script += [f"mount --bind {self.folder / 'resolv.conf'} /etc/resolv.conf"]
        script += [f"{shutil.which('sshd')} -D -e -f {shlex.quote(str(self.folder / 'sshd_config'))} &"]
        log = (self.folder / f"{name}.txt").open("a")
        process = subprocess.Popen(
            [*ISOLATED, "sh", "-c", "\n".join([*script, "exec cat"])],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        end = time.monotonic() + 10
        while not any(child.name() == "cat" for child in psutil.Process(process.pid).children()):
            assert process.poll() is None and time.monotonic() < end, Path(log.name).read_text()
            time.sleep(0.05)
        return Host(name, address, process)

    def _join(self) -> None:
        ends = [str(host.first.pid) for host in self.hosts]
        subprocess.run(f"ip link add eth0 netns {ends[0]} type veth peer name eth0 netns {ends[1]}".split(), check=True)
        for host in self.hosts:
            subprocess.run(host.inside(["ip", "address", "add", f"{host.address}/24", "dev", "eth0"]), check=True)
            subprocess.run(host.inside(["ip", "link", "set", "eth0", "up"]), check=True)

    def _wait_for_sshd(self, host: Host) -> None:
        end = time.monotonic() + 20
        command = ["ssh", "-F", self.folder / "ssh_config", host.name, "hostname"]
        while True:
            done = subprocess.run(self.alpha.inside(command), capture_output=True, text=True)
            if done.stdout.strip() == host.name:
                return
            assert time.monotonic() < end, done.stderr + (self.folder / f"{host.name}.txt").read_text()
            time.sleep(0.2)


def _is_rank(process: psutil.Process) -> bool:
    try:
        # A launcher has its script among its arguments, too, behind its own module's name.
        started_by = process.parent()
        alive = process.status() != psutil.STATUS_ZOMBIE
        return alive and started_by is not None and "deepspeed.launcher.launch" in started_by.cmdline()
    except psutil.NoSuchProcess:
        return False
