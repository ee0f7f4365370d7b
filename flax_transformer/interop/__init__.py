"""Imports models from other libraries, and exports models to them.

| files | what they convert |
|---|---|
| `marian.py`, `marian_fields.py` | Marian models as transformers stores them; `from-marian` begins here |
| `nllb*.py`, `language_codes.py` | M2M100 and NLLB models as transformers stores them |
| `transformers_*.py` | what both of these have in common |
| `marian_native*.py`, `yaml_text.py` | Marian models in Marian's own files |
| `marian_shortlist.py` | Marian's lexical shortlists |
| `ctranslate2.py`, `stablehlo*.py` | exports alone |

In each of these groups `*_fields.py` or `*_options.py` converts the configuration, `*_tensors.py` the parameters and
`*_vocabulary.py` the vocabularies. All of them use `downloaded.py` (reads files), `tensor_files.py` (reads tensors),
`fields.py` (checks what can be converted), `parameters.py` (makes our parameters) and `folders.py` (writes a folder).
`hub.py` downloads a model.
"""
