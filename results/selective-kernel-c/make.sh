#!/usr/bin/env bash
# Make the finding of this folder again: 20 minutes on two H200s with WORKERS=8. Interrupted, it goes on.
#
#   results/selective-kernel-c/make.sh [PICKED]     from the repository's root, headwise installed
#
# PICKED is a folder as pick.py makes it; without one, Debian's package of the kernel's sources is fetched.
# Settings: HEADWISE (the command), WORKERS (runs at a time), DEVICE, OUT, STUDY.
set -euo pipefail
here=$(dirname "$0")
headwise=${HEADWISE:-headwise}
device=${DEVICE:-cuda}
out=${OUT:-runs}
study=${STUDY:-configs/studies/selective-kernel-c.yaml}
picked=${1:-data/kernel-c-picked}

if [ ! -e data/kernel-c/manifest.json ]; then
    if [ ! -d "$picked" ]; then
        mkdir -p data/kernel-c-source
        (cd data/kernel-c-source && apt-get download linux-source-6.1 && dpkg-deb -x linux-source-6.1_*.deb .)
        tar -xf data/kernel-c-source/usr/src/linux-source-6.1.tar.xz -C data/kernel-c-source
        python "$here/pick.py" data/kernel-c-source/linux-source-6.1 "$picked" 155000000
    fi
    $headwise data prepare "$picked" --tokenizer bytes --keep all --length 1025 --out data/kernel-c
fi
$headwise study "$study" --device "$device" --workers "${WORKERS:-2}" --out "$out"
$headwise budget "$out/selective-kernel-c" --baseline "$out/selective-kernel-c/flash" --device "$device" \
    --budgets 1.0 0.5 0.25 0.125 0.0625 0.03125 --sequences "${SEQUENCES:-256}" --greedy --out "$out/selective-kernel-c/budget"
