int vllm_small_answer(void);
int vllm_small_sum(const int *numbers, int count);
