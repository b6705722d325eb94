/* Entry point of an Android executable that is linked without the NDK. It passes the kernel's
 * argument block to Android's C library, which calls main. */
#include <stdint.h>

typedef void InitFunction(void);

typedef struct { /* structors_array_t in bionic's libc_init_common.h; all members may be empty */
  InitFunction **preinit_array, **init_array, **fini_array;
  intptr_t preinit_array_count, init_array_count, fini_array_count;
} Structors;

int main(int count, char **words);

__attribute__((noreturn)) void __libc_init(void *argument_block, void (*on_exit)(void),
                                           int (*entry)(int, char **), const Structors *);

__attribute__((used, noreturn)) void start_with_arguments(void *argument_block) {
  static const Structors none;
  __libc_init(argument_block, 0, (int (*)(int, char **))main, &none);
}

__asm__(".globl _start\n"
        "_start:\n"
        "  mov x29, #0\n"
        "  mov x30, #0\n"
        "  mov x0, sp\n"
        "  b start_with_arguments\n");
