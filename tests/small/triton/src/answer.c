#include <llvm/small.h>
int triton_small_answer(void) { return SMALL_LLVM + 2; }
