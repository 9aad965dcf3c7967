int vllm_small_spin(int times) {
  while (times > 0) times--;
  return times;
}
