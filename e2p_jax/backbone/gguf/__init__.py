"""GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) as backbones.

One file holds config, tokenizer, chat template and weights under llama.cpp's names. `file` reads the format, `config`
and `tokenizer` say in Hugging Face's words what the metadata means, `tensors` what the weights are. Of the package
`gguf` come the blocks' sizes, their dequantisation and the table of tensor names; no torch.
"""
