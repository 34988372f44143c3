/* A library that takes cudaMalloc from whoever came first. */
int cudaMalloc(void **memory, unsigned long bytes);
int use(void) {
    void *memory = 0;
    return cudaMalloc(&memory, 8);
}
