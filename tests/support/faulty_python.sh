#!/bin/bash
# A Python whose megagamma/pretrain.py has a fault in it, see faulty_rank.py. Anything else it runs as it is.
case $1 in
  *pretrain.py) exec "$REAL_PYTHON" "$(dirname "$0")/faulty_rank.py" "$@" ;;
  *) exec "$REAL_PYTHON" "$@" ;;
esac
