#!/bin/sh
# Exports mini in every way that the README compares, into folders named as below.
# Usage: mini-engines.sh EXPORT_COMMAND FOLDER, or mini-engines.sh --names
set -e
while read -r name options; do
  if [ "$1" = --names ]; then
    echo "$name"
  elif [ ! -f "$2/$name/mmr5_engine.json" ]; then
    "$1" --model mini --output "$2/$name" $options
  fi
done <<END
bf16 --quant bf16
int8 --quant int8
fp8 --quant fp8
int8-weight-only --quant int8-weight-only
int4-rtn --quant int4 --method rtn
int4-rtn-mse --quant int4 --method rtn-mse
int4-awq --quant int4 --method awq
int4-gptq --quant int4
int4-gptq-g64 --quant int4 --group-size 64
int4-gptq-g32 --quant int4 --group-size 32
int4-mixed --quant int4-mixed
END
