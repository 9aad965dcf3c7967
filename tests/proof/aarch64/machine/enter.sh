#!/bin/sh
# enter.sh ROOT QEMU COMMAND…: run a command in a system of arm64, as root of a user namespace.
# The kernel runs its programs through QEMU; the registration is of this namespace and ends with it
# (Linux 6.7). /proc has the memory and the processors of a DGX Spark.
set -eu
root=$1 qemu=$2
shift 2
mount --make-rprivate /
mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
# An ELF file: 64 bits, little endian, an executable or a library, of AArch64 (e_machine 183).
printf '%s' ':arm64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:'"$qemu:F" \
    > /proc/sys/fs/binfmt_misc/register
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mount -t proc proc "$root/proc"
mount --bind "$root/opt/spark/meminfo" "$root/proc/meminfo"
mount --bind "$root/opt/spark/cpuinfo" "$root/proc/cpuinfo"
# Not exec: the first process of a namespace would ignore the signals that end others.
chroot "$root" "$@"
