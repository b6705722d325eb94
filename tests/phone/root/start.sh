#!/bin/sh
# Sets up the root directory of a phone and starts adbd:
#
#     unshare --mount sh start.sh ROOT TREE STATE DATA PORT
#
# The root contains nothing of the host except a few devices. /system/bin contains an arm64 shell, arm64
# tools and the fakes from `bin/`, which read and write STATE (mounted at /phone). DATA is the storage of
# the phone. adbd, which is not an arm64 program, is in a separate folder with its own libraries.
set -e
root=$1 tree=$2 state=$3 data=$4 port=$5
here=$(dirname "$0")
mount -t tmpfs -o mode=755 tmpfs "$root"
cd "$root"
mkdir -p apex/adbd system/bin system/lib64 lib proc dev sys/devices/system phone data
mount --bind "$tree/adbd" apex/adbd
mount --bind "$state" phone
mount --bind "$data" data

cp "$tree/arm64/usr/bin/mksh-static" system/bin/sh
cp "$tree/arm64/usr/bin/toybox" system/bin/
# toybox needs a C library, which is in a folder that is not searched without LD_LIBRARY_PATH
cp "$tree/arm64/usr/lib/aarch64-linux-gnu/ld-linux-aarch64.so.1" lib/
cp "$tree/arm64/usr/lib/aarch64-linux-gnu/libc.so.6" "$tree"/arm64/usr/lib/aarch64-linux-gnu/libcrypt.so.1 \
  "$tree"/arm64/usr/lib/aarch64-linux-gnu/libm.so.6 system/lib64/
cp "$here"/bin/* system/bin/
ln -s system/bin bin

mount -t proc proc proc
mount --bind phone/cpuinfo proc/cpuinfo
cp -r phone/cpu sys/devices/system/cpu
for device in null zero full random urandom; do
  : > "dev/$device"
  mount --bind "/dev/$device" "dev/$device"
done
mkdir dev/pts
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx

environment="PATH=/system/bin HOME=/ TMPDIR=/data/local/tmp LD_LIBRARY_PATH=/system/lib64 ADBD_PORT=$port"
chroot=$(PATH=$PATH:/usr/sbin:/sbin command -v chroot)
for applet in $(env -i $environment "$chroot" . /system/bin/toybox); do
  [ -e "system/bin/$applet" ] || ln -s toybox "system/bin/$applet"
done
libraries=/apex/adbd/usr/lib/x86_64-linux-gnu
exec env -i $environment "$chroot" . "$libraries/ld-linux-x86-64.so.2" \
  --library-path "$libraries:$libraries/android" /apex/adbd/usr/lib/android-sdk/platform-tools/adbd
