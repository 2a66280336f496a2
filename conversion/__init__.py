"""Original checkpoints to hfvlm: one module an architecture, which ends with its `CONVERSION`.

A module has the public functions `config_from_original(original, state_dict)`, `keys_for(config, layout, keys)` and
`processor_for(config, settings, vocabulary)`; `hfvlm.checkpoints.conversion.Conversion` describes what each takes.
`blocks` has the rows that several architectures share, `processors` what their processors share, and `interop` what
goes to and from transformers' own folders.
"""
