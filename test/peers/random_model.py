"""A Llama of random weights for vLLM: random_model.py DIRECTORY. 213 million parameters: evaluating a prompt of
3,000 tokens takes longer than loading its KV."""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=16,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=8192,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=True,
)
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(sys.argv[1])
