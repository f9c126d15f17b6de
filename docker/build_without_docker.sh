#!/usr/bin/env bash
# Build the CPU image on a Debian machine without a Docker engine, and try it: see `usage`, or run with --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: docker/build_without_docker.sh [OPTIONS]

Makes a Debian base with mmdebstrap, builds docker/Dockerfile.cpu on it with buildah, then, inside the image, prunes and
exports a tiny random BERT. Prints the image's size; fails unless every file is there and user 1000 wrote it.
Needs: apt-get install mmdebstrap buildah; root, or unprivileged user namespaces; 8 GB below TMPDIR; no running service.

Options:
  --keep            Leave the image in its temporary storage, and say how to use it. Default: all is removed.
  --pip-conf FILE   pip's settings for the build (index, wheel folders). Mounted for pip only, never part of the image.
  --ca FILE         Certificates for the build (PEM), at Debian's usual place. Never part of the image.
  --mount DIR       A folder that pip reads, such as local wheels: read-only, at the same path; repeatable.
                    An empty folder of that name stays in the image.
  --help            This text.

Environment:
  PIP_ARGS          More arguments of pip: PIP_ARGS='--extra-index-url ...' for an index with CPU builds of torch.
  SUITE             Debian release of the base; default bookworm, whose Python 3.11 is the one of constraints.txt.
  MIRROR            Debian mirror, or a file of apt sources; default: mmdebstrap's.
  MMDEBSTRAP_ARGS   More arguments of mmdebstrap, such as --aptopt='Acquire::http { Proxy "http://..."; }'.
  TMPDIR            Where the temporary storage lies; default /tmp.
TEXT
}

die() {
  echo "error: $*" >&2
  exit 2
}

keep=false
mounts=()
secrets=()
while (($#)); do
  case "$1" in
    --keep) keep=true ;;
    --pip-conf | --ca | --mount)
      (($# > 1)) || die "$1 needs a path; see --help."
      path=$(realpath -e -- "$2" 2>/dev/null) || die "$1: there is nothing at $2."
      case "$1" in
        --pip-conf) secrets+=(--secret "id=pip_conf,src=$path") ;;
        --ca) secrets+=(--secret "id=ca,src=$path") ;;
        --mount) mounts+=(--volume "$path:$path:ro") ;;
      esac
      shift
      ;;
    --help | -h)
      usage
      exit 0
      ;;
    *) die "unknown option $1; see --help." ;;
  esac
  shift
done
for tool in mmdebstrap buildah; do
  command -v "$tool" >/dev/null || die "$tool is missing. Run: apt-get install mmdebstrap buildah"
done

repo=$(realpath -- "$(dirname -- "${BASH_SOURCE[0]}")/..")
folder=$(mktemp -d "${TMPDIR:-/tmp}/optin-image.XXXXXXXX")
# vfs and chroot ask nothing of the kernel: no overlay, no cgroups, no network of its own.
buildah=(buildah --root "$folder/storage" --runroot "$folder/run" --storage-driver vfs)
image=localhost/optin-deploy:cpu
base=localhost/debian-python:base

clean_up() {
  "${buildah[@]}" rm --all >/dev/null 2>&1 || true # unmounts; there may be nothing yet
  if "$keep"; then
    echo "kept: ${buildah[*]} images"
    echo "into a Docker engine: ${buildah[*]} push $image docker-archive:optin.tar:optin-deploy:cpu && docker load -i optin.tar"
  else
    rm -rf -- "$folder"
  fi
}
trap clean_up EXIT

step() {
  echo "==> $* (at ${SECONDS} s)"
}

step "Debian base"
extra=()
read -ra extra <<<"${MMDEBSTRAP_ARGS:-}"
mmdebstrap --quiet --variant=minbase --include=python3,python3-pip,ca-certificates \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
  "${extra[@]}" "${SUITE:-bookworm}" "$folder/base.tar" ${MIRROR:+"$MIRROR"}
container=$("${buildah[@]}" from scratch)
"${buildah[@]}" add --quiet "$container" "$folder/base.tar" /
"${buildah[@]}" config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
"${buildah[@]}" commit --quiet --rm "$container" "$base"
rm -- "$folder/base.tar"

step "image"
"${buildah[@]}" bud --isolation chroot --network host --file "$repo/docker/Dockerfile.cpu" \
  --ignorefile "$repo/docker/Dockerfile.cpu.dockerignore" --build-arg "BASE=$base" --build-arg "PIP_ARGS=${PIP_ARGS:-}" \
  --build-arg "REVISION=$(git -C "$repo" rev-parse --verify --quiet HEAD || true)" \
  "${secrets[@]}" "${mounts[@]}" --tag "$image" "$repo"

step "try it"
container=$("${buildah[@]}" from --pull-never "$image")
inside() {
  "${buildah[@]}" run --isolation chroot --volume "$repo/docker:/docker:ro" "$container" -- "$@"
}
entrypoint=$("${buildah[@]}" inspect --type image --format '{{.OCIv1.Config.Entrypoint}}' "$image")
[[ $entrypoint == "[optin]" ]] || die "the entrypoint is $entrypoint, not [optin]."
inside optin --help >/dev/null
inside optin-export --help >"$folder/help.txt"
grep -q -- --flops "$folder/help.txt" || die "optin-export --help does not explain --flops."
# -P: else the folder docker/triton would be the module `triton` that torch looks for.
inside python -P /docker/make_tiny_checkpoint.py /work/tiny
inside optin-export /work/tiny --flops 0.6 --at batch=1,seq=16 --samples 16 --seq-len 16 --threads 1 --out /work/out
for name in model.onnx report.md; do
  inside test -s "/work/out/$name" || die "the export wrote no $name."
  owner=$(inside stat --format %u "/work/out/$name")
  [[ $owner == 1000 ]] || die "$name was written by user $owner, not 1000."
done
step "done: user 1000 wrote model.onnx and report.md"
"${buildah[@]}" images
