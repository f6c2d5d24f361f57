# Sourced by scripts/setup and scripts/peers: installs Debian packages where that is allowed.
#
# Allowed means: apt-get is there, and we are root or sudo asks for no password. ENBAN_NO_APT=1 forbids it.
# Nothing here ever prompts.

# mkfs.ext4 and its like live in the sbin folders, which an ordinary user's PATH leaves out on Debian.
PATH=$PATH:/usr/sbin:/sbin

say() { printf '%s\n' "$*" >&2; }

can_apt() {
    [ -z "${ENBAN_NO_APT:-}" ] || return 1
    command -v apt-get >/dev/null 2>&1 || return 1
    [ "$(id -u)" = 0 ] || sudo -n true >/dev/null 2>&1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then env DEBIAN_FRONTEND=noninteractive "$@"
    else sudo -n env DEBIAN_FRONTEND=noninteractive "$@"; fi
}

# apt_install PACKAGE...: 0 when they are installed. The lists are fetched only if the first try fails
# (on a fresh machine there are none).
apt_install() {
    apt_log=$(mktemp) || return 1
    apt_options='-y -q --no-install-recommends -o DPkg::Lock::Timeout=120'
    # shellcheck disable=SC2086  # the options are words on purpose
    if as_root apt-get install $apt_options "$@" >"$apt_log" 2>&1 </dev/null ||
        { as_root apt-get update -q >"$apt_log" 2>&1 </dev/null &&
            as_root apt-get install $apt_options "$@" >"$apt_log" 2>&1 </dev/null; }; then
        rm -f "$apt_log"
        return 0
    fi
    say "apt-get could not install $*; its last words:"
    tail -n 5 "$apt_log" | sed 's/^/    /' >&2
    rm -f "$apt_log"
    return 1
}
