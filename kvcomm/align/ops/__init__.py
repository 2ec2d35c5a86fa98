"""Operations on whole spans of KV, each as a plain reference, for the CPU, and as a Triton kernel."""
