# Sourced by script/demo and script/test: what the host needs, and a virtual
# environment with the project in it. Does nothing the second time round.

say() { printf '\n== %s\n' "$*"; }

fail() { printf '%s\n' "$*" >&2; exit 1; }

have() { PATH="$PATH:/usr/sbin:/sbin" command -v "$1" > /dev/null 2>&1; }

# Usage: require COMMAND PACKAGE. Notes the package if the command is missing.
missing=""
require() { have "$1" || missing="$missing $2"; }

install_missing() {
    [ -n "$missing" ] || return 0
    line="apt-get install -y --no-install-recommends$missing"
    if ! have apt-get; then
        fail "These are missing:$missing (Debian's names). Install them with your package manager, then run this again."
    elif [ "$(id -u)" = 0 ]; then
        as_root=""
    elif have sudo && { [ -t 0 ] || sudo -n true 2> /dev/null; }; then
        as_root="sudo"
    else
        fail "These are missing:$missing. Run this line as root, then run this script again:

    apt-get update && $line"
    fi
    say "installing with apt:$missing"
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq update
    $as_root env DEBIAN_FRONTEND=noninteractive sh -c "$line" > "${TMPDIR:-/tmp}/smolvm-apt.log" 2>&1 ||
        { tail -n 20 "${TMPDIR:-/tmp}/smolvm-apt.log" >&2; fail "apt-get failed, see above"; }
}

require_host_tools() {
    case "$(uname -m)" in
        x86_64) require qemu-system-x86_64 qemu-system-x86 ;;
        aarch64 | arm64) require qemu-system-aarch64 qemu-system-arm ;;
    esac
    require mkfs.ext4 e2fsprogs
    require setpriv util-linux
    have python3 || missing="$missing python3"
    python3 -c 'import ensurepip, venv' 2> /dev/null || missing="$missing python3-venv"
    [ -e /etc/ssl/certs/ca-certificates.crt ] || missing="$missing ca-certificates"
}

# Usage: make_environment EXTRA. Makes $root/.venv with the project and its EXTRA.
make_environment() {
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "Python 3.11 or later is needed; this is $(python3 --version)."
    venv="$root/.venv"
    wanted="$(cat "$root/pyproject.toml"; python3 --version; echo "$1")"
    stamp="$venv/made-from-$1"
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        say "making the virtual environment $venv"
        # Unfinished, or of another Python: a new one is quicker than a repair.
        "$venv/bin/python" -c 'import pip' 2> /dev/null || rm -rf "$venv"
        [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$root[$1]"
        printf '%s\n' "$wanted" > "$stamp"
    fi
}
