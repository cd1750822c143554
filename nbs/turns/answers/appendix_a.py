"""Answers to the exercises of appendix A. The code in them runs in the notebook, behind its last
section."""


def exercise_a_1():
    """By the read rate of a sum:

        gb_per_s = weight_bytes[torch.bfloat16] / 1e6 / floor[torch.bfloat16]
        print(50.3 / gb_per_s, "ms for 50 MB")
        print(2 * 596e6 / 1e6 / gb_per_s, "ms a step")

    A product may be faster: it may ask memory for more at once than a sum, and a cache may still
    hold a part of the weights. Eight requests at once read the weights once: up to eight times as
    many tokens.
    """


def exercise_a_2():
    '''The kernel, put in with `edited` (section 4):

        ADD_TO = """#include "common.h"
        void add_to(T *x, const T *y, int64_t n) {
            #pragma omp simd
            for (int64_t i = 0; i < n; i++) x[i] = narrow(load(x[i]) + load(y[i]));
        }"""
        for dtype in DTYPES:
            with edited("small.c", '#include "common.h"', ADD_TO):
                x, y = torch.randn(2, 1000).to(dtype)
                want = x + y
                load_kernels(dtype, 16).add_to(x.data_ptr(), y.data_ptr(), len(x))
                assert torch.equal(x, want)

    `read_declarations` tells ctypes: the function begins with `void name(` in the first column.
    Arguments of a wrong type, or too few of them, are an error in Python. `static void add(` does
    not begin so, and the library does not show a static function to others.
    '''


def exercise_a_3():
    """None of the checks finds it: asking for memory early changes no result. Only time can change,
    and by how much depends on the processor's own guesses:

        with edited("attention.c", "ask_for(next + t * slot_size, heads / group * D);", ""), \\
                edited("attention.c", "ask_for(next + t * slot_size + h * D / group, D / group);",
                       ""):
            print(attention_us(CPUBackend(), 4096), "without,")
        print(attention_us(CPUBackend(), 4096), "with")

    What is there for speed needs a measurement that is looked at.
    """
