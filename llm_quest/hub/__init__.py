"""Loads and saves models: Hugging Face folders both ways, our own run folders, PEFT adapters.

`locate` finds the folder of a name; `validate` reads what the folder holds and lists everything that is wrong with it;
`load_save` loads and saves; `weight_map` turns a family's weight map into views; `safetensors_io` reads the format,
`config` the JSON files; `inspect` reports.
"""
