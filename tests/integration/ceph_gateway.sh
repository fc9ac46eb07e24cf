#!/usr/bin/env bash
# A real S3 server on loopback for tests: Ceph RGW on one monitor and one in-memory OSD. Ready in about 15 s, 250 MB.
#   apt-get install --no-install-recommends ceph-mon ceph-osd radosgw ceph-common
#   ceph_gateway.sh start DIR [PORT]    prints the endpoint; keys: test-access-key / test-secret-key
#   ceph_gateway.sh stop DIR
# Unlike a mock it checks signatures and bucket names. Everything it writes is below DIR; data lives in memory.
set -euo pipefail
dir=$(realpath -m "${2:?usage: ceph_gateway.sh start|stop DIR [PORT]}")
port=${3:-17480}
conf=(-c "$dir/ceph.conf")

stop() {
  for daemon in rgw osd mon; do
    [ -f "$dir/$daemon.child" ] || continue
    child=$(cat "$dir/$daemon.child")
    kill "$child" 2>/dev/null || true
    for _ in $(seq 100); do kill -0 "$child" 2>/dev/null || break; sleep 0.1; done
    kill -9 "$child" 2>/dev/null || true
    rm -f "$dir/$daemon.child"
  done
}

daemon() {  # daemon NAME COMMAND...: runs in the background, detached from the terminal, logs below DIR
  local name=$1; shift
  setsid "$@" >"$dir/log/$name.out" 2>&1 </dev/null &
  echo $! >"$dir/$name.child"
}

wait_for() {  # wait_for SECONDS COMMAND...
  local tries=$(($1 * 4)); shift
  for _ in $(seq "$tries"); do "$@" >/dev/null 2>&1 && return 0; sleep 0.25; done
  echo "ceph_gateway.sh: timed out waiting for: $*; logs are in $dir/log" >&2
  return 1
}

start() {
  stop
  rm -rf "$dir"/{mon.a,osd.0,rgw,log,keyring,monmap,ceph.conf}
  mkdir -p "$dir"/{mon.a,osd.0,rgw,log}
  local fsid; fsid=$(cat /proc/sys/kernel/random/uuid)
  local v2=$((port + 1)) v1=$((port + 2))
  cat >"$dir/ceph.conf" <<CONF
[global]
fsid = $fsid
mon host = [v2:127.0.0.1:$v2,v1:127.0.0.1:$v1]
mon initial members = a
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
mon max pg per osd = 1000
mon data avail crit = 1
osd crush chooseleaf type = 0
public addr = 127.0.0.1
cluster addr = 127.0.0.1
run dir = $dir
admin socket = $dir/\$name.asok
log file = $dir/log/\$name.log
pid file = $dir/\$name.pid
keyring = $dir/keyring
[mon]
mon data = $dir/mon.\$id
[mon.a]
host = localhost
[osd]
osd data = $dir/osd.\$id
osd objectstore = memstore
memstore device bytes = 2147483648
[client.rgw]
keyring = $dir/keyring
rgw data = $dir/rgw
rgw frontends = beast endpoint=127.0.0.1:$port
rgw dns name = localhost
CONF
  monmaptool --create --clobber --addv a "[v2:127.0.0.1:$v2,v1:127.0.0.1:$v1]" --fsid "$fsid" "$dir/monmap" >/dev/null
  ceph-authtool --create-keyring "$dir/keyring" --gen-key -n mon. --cap mon 'allow *' >/dev/null
  for user in client.admin client.rgw; do
    ceph-authtool "$dir/keyring" --gen-key -n $user --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *' >/dev/null
  done
  ceph-mon "${conf[@]}" --mkfs -i a --monmap "$dir/monmap" --keyring "$dir/keyring"
  daemon mon ceph-mon "${conf[@]}" -i a -f
  local osd_uuid; osd_uuid=$(cat /proc/sys/kernel/random/uuid)
  wait_for 30 timeout 20 ceph "${conf[@]}" osd new "$osd_uuid"
  ceph-authtool "$dir/keyring" --gen-key -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *' >/dev/null
  ceph "${conf[@]}" auth import -i "$dir/keyring" >/dev/null 2>&1
  ceph-osd "${conf[@]}" -i 0 --mkfs --osd-uuid "$osd_uuid" >"$dir/log/osd-mkfs.out" 2>&1
  daemon osd ceph-osd "${conf[@]}" -i 0 -f
  wait_for 60 bash -c "timeout 20 ceph -c '$dir/ceph.conf' osd stat 2>/dev/null | grep -q '1 up'"
  daemon rgw radosgw "${conf[@]}" -n client.rgw -f
  wait_for 60 curl -s -o /dev/null "127.0.0.1:$port"
  radosgw-admin "${conf[@]}" -n client.admin user create --uid=test --display-name=test \
    --access-key=test-access-key --secret=test-secret-key >/dev/null 2>"$dir/log/user.err"
  echo "http://127.0.0.1:$port"
}

case ${1:-} in
  start) trap 'stop' ERR; start ;;
  stop) stop ;;
  *) echo "usage: ceph_gateway.sh start|stop DIR [PORT]" >&2; exit 2 ;;
esac
