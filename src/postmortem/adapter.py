"""An adapter as its files describe it: what it claims and what it holds."""

from collections.abc import Mapping
from dataclasses import dataclass

from postmortem.adapter_config import (
    CONFIG_FILE,
    PEFT_TYPES,
    AdapterConfig,
    build_config,
    check_config,
    check_method,
    invalid,
)
from postmortem.adapter_weights import MAX_JSON, PICKLE_FILE, WEIGHTS_FILE, Tensor, read_weights
from postmortem.catalogue import Finding
from postmortem.contents import Contents, sort_keys
from postmortem.errors import ModelError
from postmortem.sources import Source
from postmortem.untrusted import UntrustedError, parse_json


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter; what could not be read is a finding, not a guess.

    `raw` is the JSON of the configuration, `config` its typed form when PEFT would accept it.
    """

    name: str
    raw: Mapping[str, object]
    config: AdapterConfig | None
    tensors: Mapping[str, Tensor]
    contents: Contents
    weight_bytes: int | None
    pickle_bytes: int | None
    findings: tuple[Finding, ...]


def read_adapter(source: Source) -> Adapter:
    """Read the configuration and the header; nothing is executed, unpickled or loaded whole.

    Raises ModelError when the adapter is of another method than LoRA or cannot be reached.
    """
    raw, findings = _read_config(source)
    problems = check_config(raw)
    # Without its method named, a configuration can still be held against names and sizes.
    config = None if findings or problems else build_config(raw)
    findings += [*problems, *([] if findings else check_method(raw))]
    method = raw.get("peft_type")
    if isinstance(method, str) and method in PEFT_TYPES:
        raise ModelError(source.name, expected="a LoRA adapter", found=f"peft_type {method}")
    tensors, weight_findings = read_weights(source)
    return Adapter(
        name=source.name,
        raw=raw,
        config=config,
        tensors=tensors,
        contents=sort_keys(tensors),
        weight_bytes=source.size(WEIGHTS_FILE),
        pickle_bytes=None if tensors else source.size(PICKLE_FILE),
        findings=(*findings, *weight_findings),
    )


def _read_config(source: Source) -> tuple[Mapping[str, object], list[Finding]]:
    size, expected = source.size(CONFIG_FILE), f"a JSON object of at most {MAX_JSON:,} bytes"
    if size is None and not source.is_local:
        raise ModelError(source.name, expected=CONFIG_FILE, found="no such file, or no access")
    if size is None or size > MAX_JSON:
        found = "no such file" if size is None else f"{size:,} bytes"
        return {}, [invalid(CONFIG_FILE, expected=expected, found=found)]
    try:
        raw = parse_json(source.read(CONFIG_FILE, 0, MAX_JSON))
    except UntrustedError as error:
        return {}, [invalid(CONFIG_FILE, expected=expected, found=str(error))]
    if not isinstance(raw, dict):
        return {}, [invalid(CONFIG_FILE, expected=expected, found=f"a {type(raw).__name__}")]
    return raw, []
