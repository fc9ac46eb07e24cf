#!/usr/bin/env bash
# Install the Prometheus server that scrapes runs in tests/integration/test_prometheus.py and judges the alerts, where that is
# allowed; otherwise say why not. No service is left running.
set -u
command -v prometheus >/dev/null && command -v promtool >/dev/null && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "not root on Debian: prometheus is not installed, the tests of metrics and alerts against it will be skipped"
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
running=$(pgrep -x prometheus)
apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus >/dev/null ||
  echo "apt-get could not install prometheus: the tests of metrics and alerts against it will be skipped"
[ -d /run/systemd/system ] && [ -z "$running" ] && systemctl disable --quiet --now prometheus
exit 0
