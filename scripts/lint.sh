#!/usr/bin/env bash
# lint.sh VENV FOLDER...: every static check there is. Runs them all before it fails, so that one run shows everything.
set -uo pipefail
venv=$1
shift
bin=$venv/bin
failed=()

check() {
    local name=$1
    shift
    echo "lint: $name"
    "$@" || failed+=("$name")
}

stubs_up_to_date() {
    local fresh status=0
    fresh=$(mktemp -d)
    scripts/proto.sh "$bin/python" "$fresh" >/dev/null || status=1
    diff -ru --exclude=__init__.py --exclude=__pycache__ client/d2o_inference "$fresh/d2o_inference" || status=1
    rm -rf "$fresh"
    [ "$status" -eq 0 ] || echo "The stubs differ from proto/: run make proto and commit what it writes." >&2
    return "$status"
}

manifests() {
    # Kustomize's own input is no object of the cluster, a patch is a part of one; tests/k8s validates what they render.
    find k8s -name '*.yaml' -not -name kustomization.yaml -not -name '*.patch.yaml' -print0 |
        xargs -0 -r "$bin/kubernetes-validate" --strict --quiet --no-warn
}

check "ruff check" "$bin/ruff" check --quiet --output-format concise "$@"
check "ruff format" "$bin/ruff" format --check --quiet --output-format concise "$@"
check "mypy --strict" "$bin/mypy" --strict "$@"
check "buf lint" "$bin/buf" lint
check "stubs up to date" stubs_up_to_date
check "hadolint" "$bin/hadolint" Dockerfile
check "shellcheck" "$bin/shellcheck" .ci/run scripts/*.sh
check "kubernetes-validate" manifests

if [ ${#failed[@]} -gt 0 ]; then
    printf 'lint: FAILED: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "lint: all checks passed"
