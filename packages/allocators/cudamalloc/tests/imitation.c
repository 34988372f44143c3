/* An imitation of the CUDA runtime: four devices, memory of the C library. With STUB, a library that has its names alone. */
#include <stdlib.h>
#ifndef VERSION
#define VERSION 13000
#endif
#ifndef STUB
#define STUB 0
#endif
enum { DEVICES = 4, LARGEST = 1 << 20, OUT_OF_MEMORY = 2, STUB_LIBRARY = 34, INVALID_DEVICE = 101 };

static _Thread_local int current, error;
int live[DEVICES]; /* allocations, by the device that was current */

static int fail(int code) { return error = code; }

int cudaRuntimeGetVersion(int *version) {
    *version = VERSION;
    return STUB ? STUB_LIBRARY : 0;
}
int cudaGetDevice(int *device) {
    *device = current;
    return 0;
}
int cudaSetDevice(int device) {
    if (device < 0 || device >= DEVICES) return fail(INVALID_DEVICE);
    current = device;
    return 0;
}
int cudaMalloc(void **memory, unsigned long bytes) {
    if (STUB) return fail(STUB_LIBRARY);
    if (bytes > LARGEST) return fail(OUT_OF_MEMORY);
    int *made = malloc(bytes + 16);
    *made = current;
    __sync_fetch_and_add(&live[current], 1);
    *memory = made + 4;
    return 0;
}
int cudaFree(void *memory) {
    if (!memory) return fail(1);
    int *made = (int *)memory - 4;
    __sync_fetch_and_sub(&live[*made], 1);
    free(made);
    return 0;
}
int cudaGetLastError(void) {
    int last = error;
    error = 0;
    return last;
}
int cudaPeekAtLastError(void) { return error; }
