#!/usr/bin/env bash
# Make the findings of this folder again. Interrupted, it goes on.
#
#   results/attention-kinds/make.sh [PICKED]     from the repository's root, headwise installed
#
# PICKED is a folder of C files as results/selective-kernel-c/pick.py makes it; without one, Debian's package of the
# kernel's sources is fetched. Settings: HEADWISE (the command), WORKERS (runs at a time), DEVICE, OUT.
set -euo pipefail
headwise=${HEADWISE:-headwise}
out=${OUT:-runs}
picked=${1:-data/kernel-c-512-picked}

if [ ! -e data/kernel-c-512/manifest.json ]; then
    if [ ! -d "$picked" ]; then
        mkdir -p data/kernel-c-source
        (cd data/kernel-c-source && apt-get download linux-source-6.1 && dpkg-deb -x linux-source-6.1_*.deb .)
        tar -xf data/kernel-c-source/usr/src/linux-source-6.1.tar.xz -C data/kernel-c-source
        python results/selective-kernel-c/pick.py data/kernel-c-source/linux-source-6.1 "$picked" 112000000
    fi
    $headwise data prepare "$picked" --tokenizer bytes --keep all --length 513 --out data/kernel-c-512
fi
for study in selective-layers modifiers attention-kinds; do
    $headwise study "configs/studies/$study-kernel-c.yaml" --device "${DEVICE:-cuda}" --workers "${WORKERS:-2}" --out "$out"
done
