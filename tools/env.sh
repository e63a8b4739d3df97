# Sourced by the other scripts: makes a virtual environment in the checkout and fills it.
# Needs only python3 (3.11 or newer) and pip; uses uv where it is installed.
#   PYTHON=python3.12   another interpreter        VENV=.venv-3.12   another place
#   EXTRAS=dev          what to install besides the core
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) # the caller's folder stays: arguments may be relative to it

PYTHON=${PYTHON:-python3}
VENV=$root/${VENV:-.venv}
EXTRAS=${EXTRAS:-}

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  for candidate in python3.13 python3.12 python3.11; do
    if "$candidate" -c 'pass' 2>/dev/null; then PYTHON=$candidate && break; fi
  done
fi
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "error: $PYTHON is older than Python 3.11 or missing; install one and set PYTHON=/path/to/python3" >&2
  exit 2
fi

minor=$("$PYTHON" -c 'import sys; print("3.11" if sys.version_info[:2] == (3, 11) else "3.12")')
constraints=$root/tools/constraints-$minor.txt
case ",$EXTRAS," in
  *,beam,*) # some of the pins are different there
    instead=$root/tools/constraints-beam.txt
    names=$(sed -n 's/^\([A-Za-z][^=]*\)==.*/^\1==/p' "$instead")
    { grep -vi "$names" "$constraints"; cat "$instead"; } >"$VENV.constraints"
    constraints=$VENV.constraints
    ;;
esac
# one stamp per state of the files that decide what is installed; extras add up
stamp="$VENV/.llm_jax-$(cat "$root/pyproject.toml" "$constraints" | cksum | cut -d' ' -f1)-${EXTRAS:-core}"
if [ ! -e "$stamp" ]; then
  echo "setting up ${VENV#"$root"/} ($("$PYTHON" --version), first time only)"
  target="$root${EXTRAS:+[$EXTRAS]}"
  if command -v uv >/dev/null 2>&1; then
    [ -x "$VENV/bin/python" ] || uv venv --quiet --seed --python "$PYTHON" "$VENV"
    uv pip install --quiet --python "$VENV/bin/python" --constraint "$constraints" --editable "$target"
  else
    [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$constraints" \
      --editable "$target" 2> >(grep -v '^WARNING: Location' >&2)
  fi
  touch "$stamp"
fi
PATH="$VENV/bin:$PATH"
