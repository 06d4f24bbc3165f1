#!/bin/sh
# Exports mini in every way that is compared in the README: name, then options of mmr5-export.
# Usage: mini-engines.sh EXPORT_COMMAND FOLDER
set -e
while read -r name options; do
  [ -f "$2/$name/mmr5_engine.json" ] || "$1" --model mini --output "$2/$name" --force $options
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
