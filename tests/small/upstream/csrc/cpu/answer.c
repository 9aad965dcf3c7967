int vllm_small_answer(void) { return 42; }
