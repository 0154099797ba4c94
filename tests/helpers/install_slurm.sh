#!/bin/sh
# Install what tests/launch/test_slurm.py needs, on Debian or Ubuntu. No service is started: the test starts its own.
set -e
command -v slurmctld > /dev/null && command -v slurmd > /dev/null && command -v munged > /dev/null && exit 0
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge
