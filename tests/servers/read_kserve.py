"""Run with KServe's Python: reads an InferenceService and a V2 metadata answer by KServe's own types, strictly.

Usage: python read_kserve.py SERVICE.yaml METADATA.json
Prints both as KServe understood them, as one JSON object. Fields that its schema does not know are an error.
"""

import json
import re
import sys
from pathlib import Path

import kserve.models
import kubernetes.client
import yaml
from kserve import ApiClient
from kserve.protocol.rest.v2_datamodels import ModelMetadataResponse

PRIMITIVES = {"str": str, "int": int, "bool": bool, "float": (int, float), "object": object}


def read(data, kind, where):
    """`data` as an object of the schema's type `kind`."""
    if kind in PRIMITIVES:
        if not isinstance(data, PRIMITIVES[kind]):
            raise TypeError(f"{where}: {data!r} is no {kind}")
        return data
    if listed := re.fullmatch(r"[lL]ist\[(.+)\]", kind):
        return [read(each, listed[1], f"{where}[{i}]") for i, each in enumerate(data)]
    if mapped := re.fullmatch(r"[dD]ict[\[(]str, (.+)[\])]", kind):
        return {key: read(value, mapped[1], f"{where}.{key}") for key, value in data.items()}
    schema = getattr(kserve.models, kind, None) or getattr(kubernetes.client, kind)
    fields = {name: attribute for attribute, name in schema.attribute_map.items()}
    if unknown := sorted(set(data) - set(fields)):
        raise TypeError(f"{where}: {kind} has no field {', '.join(unknown)}")
    return schema(
        **{
            fields[name]: read(value, schema.openapi_types[fields[name]], f"{where}.{name}")
            for name, value in data.items()
        }
    )


service = read(yaml.safe_load(Path(sys.argv[1]).read_text()), "V1beta1InferenceService", "service")
metadata = ModelMetadataResponse.model_validate_json(Path(sys.argv[2]).read_bytes())
understood = {
    "service": ApiClient().sanitize_for_serialization(service),
    "metadata": metadata.model_dump(),
}
print(json.dumps(understood))
