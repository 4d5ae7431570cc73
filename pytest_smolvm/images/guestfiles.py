"""The text files of a guest: what the initial RAM disk and the first process do."""

from __future__ import annotations

from collections.abc import Iterable

from pytest_smolvm.usernet import GATEWAY, GUEST_ADDRESS, NAME_SERVER, PREFIX_LENGTH

_SSH_OPTIONS = "-s -W 262144 -r /etc/dropbear/dropbear_ed25519_host_key"

SSH_SIGN = b"Not backgrounding"
"""What dropbear says on the console (-F -E) once it listens: main_noinetd in svr-main.c."""

COMPANION = "/run/smolvm"
"""Where an imported guest has what it gets from us."""

_SSH_OPTIONS_OF_COMPANION = f"-s -W 262144 -r {COMPANION}/host_key"

WITHOUT_PCI = "smolvm.vsock"
"""A word on the kernel's command line; one with a dot in it is nothing to the kernel, nor to init:
Documentation/admin-guide/kernel-parameters.rst."""

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def initrd_init(modules: Iterable[str], modules_without_pci: Iterable[str]) -> str:
    """``/init`` of the initial RAM disk: load the drivers, mount the root, hand over.

    Debian's busybox finds its applets through /proc/self/exe, hence the full
    path wherever /proc is not there yet, or there no more.
    """
    return f"""#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
mount -t devtmpfs dev /dev
# What is merely written to the console may still wait in its queue when the end of
# this process panics the kernel. The kernel's own log is written out at once.
give_up() {{
    echo "<2>smolvm: $*" > /dev/kmsg
    exit 1
}}
read -r line < /proc/cmdline
modules="{" ".join(modules)}"
case " $line " in
    *" {WITHOUT_PCI} "*) modules="$modules {" ".join(modules_without_pci)}" ;;
esac
for module in $modules; do
    insmod "/modules/$module.ko"
done
root=/dev/vda
init=/sbin/init
flags=ro
type=ext4
for argument in $line; do
    case "$argument" in
        root=*) root="${{argument#root=}}" ;;
        init=*) init="${{argument#init=}}" ;;
        rootfstype=*) type="${{argument#rootfstype=}}" ;;
        rw) flags=rw ;;
        ro) flags=ro ;;
    esac
done
case "$root" in
    LABEL=*|UUID=*) root="$(findfs "$root")" ;;
esac
tries=0
while [ ! -b "$root" ] && [ "$tries" -lt 250 ]; do
    tries=$((tries + 1))
    usleep 20000
done
# A journal that needs replay cannot be replayed on a read-only disk: noload.
mount -t "$type" -o "$flags" "$root" /root-disk 2> /dev/null ||
    mount -t "$type" -o ro "$root" /root-disk 2> /dev/null ||
    mount -t "$type" -o ro,noload "$root" /root-disk ||
    give_up "the root disk $root cannot be mounted as $type"
if [ "$init" = /init ] && [ -d /smolvm ]; then
    # The root disk knows nothing of us: what it lacks is put where nothing stays.
    mkdir -p /root-disk/run
    mount -t tmpfs -o mode=0755 tmpfs /root-disk/run || give_up "the root disk has no folder /run"
    cp -a /smolvm /root-disk{COMPANION}
    init={COMPANION}/init
fi
[ -x "/root-disk$init" ] || give_up "the root disk has no program $init to start"
mount --move /dev /root-disk/dev
mount --move /proc /root-disk/proc
exec /bin/busybox switch_root /root-disk "$init"
"""


AGENT = "usr/lib/smolvm/agent"

# A machine whose network is vsock has no card, if it may not go out.
_NETWORK = f"""if [ -e /sys/class/net/eth0 ]; then
    ip addr add {GUEST_ADDRESS}/{PREFIX_LENGTH} dev eth0
    ip link set eth0 up
    ip route add default via {GATEWAY}
fi"""

MICRO_INIT = f"""#!/bin/busybox sh
# The first process of the micro image: mounts, network, then busybox init,
# which keeps the SSH server running (see /etc/inittab).
export PATH={PATH}
[ -e /proc/self ] || /bin/busybox mount -t proc proc /proc
[ -c /dev/null ] || mount -t devtmpfs dev /dev
mount -t sysfs sys /sys
mount -t tmpfs -o mode=0755 tmpfs /run
mkdir -p /dev/pts /dev/shm
mount -t devpts -o mode=0620,ptmxmode=0666 devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
while read -r device where type options rest; do
    case "$where $options" in
        # A root disk that is shared with other VMs cannot be written to; these
        # few places must be.
        "/ ro"|"/ ro,"*)
            mount -t tmpfs -o mode=1777 tmpfs /tmp
            mount -t tmpfs -o mode=0755 tmpfs /var
            mkdir -p /var/tmp /var/log
            mount -t tmpfs -o mode=0755 tmpfs /etc/profile.d
            ;;
    esac
done < /proc/mounts
# The VM's id, if the kernel was given it.
read -r name < /proc/sys/kernel/hostname
[ "$name" != "(none)" ] || hostname -F /etc/hostname
if [ -w /etc/machine-id ] && ! read -r id < /etc/machine-id; then
    read -r id < /proc/sys/kernel/random/uuid
    echo "${{id//-/}}" > /etc/machine-id
fi
ip link set lo up
{_NETWORK}
[ ! -c /dev/vsock ] || /{AGENT} relay < /dev/null > /dev/null 2>&1 &
exec /bin/busybox init
"""


MICRO_INITTAB = f"""# SSH is how the host reaches this guest: no passwords, one known host key.
::respawn:/usr/sbin/dropbear -F -E -p 22 {_SSH_OPTIONS}
::ctrlaltdel:/sbin/reboot
::shutdown:/bin/sync
::shutdown:/bin/umount -a -r
"""

_SHUTDOWN_GRACE_US = 300_000

COMPANION_INIT = f"""#!{COMPANION}/busybox sh
# The first process of an imported guest: mounts, network, an SSH server that is kept running.
# Of the distribution's own files none is changed, but for root's authorized keys.
here={COMPANION}
export PATH={PATH}:$here/bin
[ -e /proc/self ] || mount -t proc proc /proc
[ -c /dev/null ] || mount -t devtmpfs dev /dev
[ -e /sys/kernel ] || mount -t sysfs sys /sys
mkdir -p /dev/pts /dev/shm
mount -t devpts -o mode=0620,ptmxmode=0666 devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup 2> /dev/null
while IFS=: read -r name _ _ _ _ home _; do
    [ "$name" != root ] || break
done < /etc/passwd
home="${{home:-/root}}"
while read -r device where type options rest; do
    case "$where $options" in
        # A root disk that is shared with other VMs cannot be written to; these
        # few places must be.
        "/ ro"|"/ ro,"*)
            for folder in /tmp /var/tmp "$home" /etc/profile.d; do
                [ ! -d "$folder" ] || mount -t tmpfs -o mode=0755 tmpfs "$folder"
            done
            chmod 1777 /tmp /var/tmp 2> /dev/null
            ;;
    esac
done < /proc/mounts
# The VM's id, if the kernel was given it.
read -r name < /proc/sys/kernel/hostname
[ "$name" != "(none)" ] || [ ! -r /etc/hostname ] || hostname -F /etc/hostname
if [ -w /etc/machine-id ]; then
    id=
    read -r id < /etc/machine-id
    case "$id" in
        ""|uninitialized)
            read -r id < /proc/sys/kernel/random/uuid
            echo "${{id//-/}}" > /etc/machine-id
            ;;
    esac
fi
ip link set lo up
{_NETWORK}
[ ! -c /dev/vsock ] || $here/agent relay < /dev/null > /dev/null 2>&1 &
if [ -e /etc/resolv.conf ]; then
    mount --bind $here/resolv.conf /etc/resolv.conf
else
    cp $here/resolv.conf /etc/resolv.conf
fi
read -r key < $here/authorized_keys
if ! grep -qF "$key" "$home/.ssh/authorized_keys" 2> /dev/null; then
    mkdir -p "$home/.ssh" && chmod 700 "$home/.ssh"
    cat $here/authorized_keys >> "$home/.ssh/authorized_keys"
    chmod 600 "$home/.ssh/authorized_keys"
fi
# What init(8) does when it is told to end the system, for whoever runs poweroff or reboot.
end() {{
    trap "" TERM INT USR1 USR2
    usleep {_SHUTDOWN_GRACE_US} # whoever asked for it is to hear that it was done
    kill -TERM -1
    usleep {_SHUTDOWN_GRACE_US}
    kill -KILL -1
    sync
    umount -a -r 2> /dev/null
    mount -o remount,ro / 2> /dev/null
    $here/busybox "$1" -f
}}
trap "end poweroff" USR2
trap "end halt" USR1
trap "end reboot" TERM INT
while :; do
    LD_LIBRARY_PATH=$here/lib $here/dropbear -F -E -p 22 {_SSH_OPTIONS_OF_COMPANION} &
    server=$!
    while kill -0 $server 2> /dev/null; do
        wait $server
    done
    sleep 1 # one that cannot start is not tried all the time
done
"""

COMPANION_SSH_ON_PORT = f"""#!{COMPANION}/busybox sh
export LD_LIBRARY_PATH={COMPANION}/lib
exec {COMPANION}/dropbear -i {_SSH_OPTIONS_OF_COMPANION}
"""

COMPANION_APPLETS = [
    *("sh", "cat", "chmod", "cp", "grep", "hostname", "ip", "kill", "mkdir", "mount", "mv", "rm"),
    *("setsid", "sleep", "stat", "sync", "tar", "umount", "usleep"),
]
"""What the host may ask of a guest whose distribution lacks it."""

COMPANION_SCRIPTS = {
    name: f"#!{COMPANION}/busybox sh\nexec {COMPANION}/busybox kill -{signal} 1\n"
    for name, signal in {"poweroff": "USR2", "halt": "USR1", "reboot": "TERM"}.items()
}

RESOLV_CONF = f"nameserver {NAME_SERVER}\n"

SSH_ON_PORT = "usr/lib/smolvm/ssh-on-port"
"""The program that speaks SSH on its standard input and output, for the agent to start."""

MICRO_SSH_ON_PORT = f"""#!/bin/sh
exec /usr/sbin/dropbear -i {_SSH_OPTIONS}
"""

PROFILE = f"""export PATH={PATH}
for script in /etc/profile.d/*.sh; do
    [ -r "$script" ] && . "$script"
done
unset script
"""

MICRO_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    "etc/shadow": "root:*:19000::::::\n",
    "etc/shells": "/bin/sh\n",
    "etc/hostname": "micro\n",
    # Empty means "made up at the first boot": machine-id(5).
    "etc/machine-id": "",
    "etc/hosts": "127.0.0.1 localhost\n127.0.1.1 micro\n::1 localhost\n",
    "etc/resolv.conf": RESOLV_CONF,
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "etc/profile": PROFILE,
    "etc/inittab": MICRO_INITTAB,
    "etc/os-release": 'ID=smolvm-micro\nNAME="smolvm micro"\nPRETTY_NAME="smolvm micro"\n',
}
