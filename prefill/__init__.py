"""The prefill worker: reads prompts, pushes their KV while it computes, samples the first token."""
