#!/bin/sh
# Exports mini in the ways that the README compares, into folders named as below: all of them, or
# those that are named. What is there already is kept.
# Usage: mini-engines.sh EXPORT_COMMAND FOLDER [NAME...], or mini-engines.sh --names
set -e
command=$1 folder=$2
if [ "$command" != --names ]; then
  shift 2
fi
while read -r name options; do
  if [ "$command" = --names ]; then
    echo "$name"
  elif [ ! -f "$folder/$name/mmr5_engine.json" ]; then
    case " ${*:-$name} " in
      *" $name "*) "$command" --model mini --output "$folder/$name" $options ;;
    esac
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
