"""Second floor: the door to published models. Hugging Face folders in and out, our own run folders in.

`names` turns a page's table into places, `tensors` knows the safetensors format, `config` the JSON beside it,
`download_snapshot` where a name leads; `validate_folder` finds out what a folder holds and everything that is wrong
with it; `files` loads and saves, `inspect` reports.
"""
