#!/usr/bin/env bash
# read_only.sh ROOT VOLUME COMMAND...: run a command in an unpacked image as a strict pod would, where there is no container engine.
#
# Own mounts, processes and host name; the root is read-only; user 10001, no capability, no new privileges; /tmp and /dev/shm are
# memory, VOLUME is /mnt. The environment is the image's: NAME=VALUE lines in ROOT.env.
set -euo pipefail
root=$1 volume=$2
shift 2
mapfile -t environ <"$root.env"
in_namespaces='
  set -e
  root=$1 volume=$2
  shift 2
  hostname pod
  mount --make-rprivate /
  mount --bind "$root" "$root"
  mount -o remount,bind,ro "$root"
  mount -t proc proc "$root/proc"
  mount -t sysfs -o ro sysfs "$root/sys"
  mount -t tmpfs -o mode=755 tmpfs "$root/dev"
  for name in null zero random urandom; do touch "$root/dev/$name"; mount --bind "/dev/$name" "$root/dev/$name"; done
  mkdir -m 1777 "$root/dev/shm"
  mount -t tmpfs -o nosuid,nodev,mode=1777 tmpfs "$root/dev/shm"
  mount -t tmpfs -o nosuid,nodev,mode=1777 tmpfs "$root/tmp"
  mount --bind "$volume" "$root/mnt"
  exec chroot "$root" setpriv --reuid 10001 --regid 10001 --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all \
    env --ignore-environment --chdir /opt/personmae "$@"'
exec unshare --mount --pid --fork --uts --ipc --kill-child sh -c "$in_namespaces" sh "$root" "$volume" "${environ[@]}" "$@"
