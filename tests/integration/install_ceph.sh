#!/usr/bin/env bash
# Install the Ceph gateway that tests/integration/test_s3.py reads and writes, where that is allowed; otherwise say why not.
set -u
packages=(ceph-mon ceph-osd radosgw ceph-common)
command -v radosgw >/dev/null && command -v ceph-mon >/dev/null && command -v ceph-osd >/dev/null && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "not root on Debian: ${packages[*]} are not installed, the tests against a Ceph gateway will be skipped"
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq && apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null ||
  echo "apt-get could not install ${packages[*]}: the tests against a Ceph gateway will be skipped"
