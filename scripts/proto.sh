#!/usr/bin/env bash
# proto.sh PYTHON FOLDER: writes the stubs of everything in proto/ into FOLDER.
set -euo pipefail
python=$1
folder=$2
find proto -name '*.proto' -exec "$python" -m grpc_tools.protoc --proto_path=proto \
    --python_out="$folder" --pyi_out="$folder" --grpc_python_out="$folder" {} +
echo "proto: wrote the stubs of proto/ into $folder"
