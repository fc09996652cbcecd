#!/bin/sh
# Builds the wheel and the source archive, installs the wheel without the checkout at hand, and runs
# the program from another folder; then runs it from a bare checkout that is not installed.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

git -C "$root" ls-files -z | (cd "$root" && xargs -0 tar cf -) | (mkdir "$work/source" && tar xf - -C "$work/source")
"$python" -m build --outdir "$work/dist" "$work/source" >"$work/build.log" 2>&1 || {
    cat "$work/build.log"
    exit 1
}
# The environment's packages are borrowed; the package itself comes from the wheel alone.
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$work/site" \
    "$work"/dist/*.whl
two_steps="train.steps=2 count=2 samplers.euler_maruyama.steps=2 samplers.predictor_corrector.steps=2
    likelihood.probes=1 likelihood.rtol=0.1 likelihood.atol=0.1 progress=false"

cd "$work"
echo "wheel: python -m scoresde.run"
PYTHONPATH="$work/site" "$python" -c "
import scoresde
assert scoresde.__file__.startswith('$work/site'), scoresde.__file__
from scoresde.interop import diffusers, score_sde
assert score_sde.names(), 'the published configurations are missing'"
# shellcheck disable=SC2086
PYTHONPATH="$work/site" "$python" -m scoresde.run $two_steps hydra.run.dir=from_wheel
test -s from_wheel/report.html
echo "wheel: scoresde --help"
PYTHONPATH="$work/site" "$python" "$work/site/bin/scoresde" --help | grep -q "digits_vp"

echo "bare checkout: python -m scoresde.run"
cd "$work/source"
# Without site-packages' link to the checkout, only the folder itself can be found.
"$python" -c "
import runpy, sys
sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]
sys.argv = ['scoresde', '--cfg', 'job', '--resolve']
runpy.run_module('scoresde.run', run_name='__main__')" | grep -q "name: digits_vp"
echo "the wheel and the bare checkout work"
