/* Functions for torch's CUDAPluggableAllocator over a CUDA runtime that Python has loaded and hands over.

   In C, because torch calls them with its allocator's lock held: a Python callback would wait for the interpreter's lock
   there, which another thread may hold while it frees a tensor and waits for the allocator's. Without headers and
   libraries, so that neither CUDA nor a certain libc is needed to build or load this. */

typedef unsigned long size;

struct runtime { /* Of cuda_runtime_api.h; all return cudaError_t, whose 0 is success. */
    int (*allocate)(void **memory, size bytes);
    int (*release)(void *memory);
    int (*get_device)(int *device);
    int (*set_device)(int device);
    int (*take_error)(void);
};

static struct runtime runtime;

/* Once, before the others. */
void weft_use_runtime(const struct runtime *given) {
    runtime.allocate = given->allocate;
    runtime.release = given->release;
    runtime.get_device = given->get_device;
    runtime.set_device = given->set_device;
    runtime.take_error = given->take_error;
}

/* Memory on `device`, whichever is current; null if there is none, as torch expects it. */
void *weft_allocate(size bytes, int device, void *stream) {
    (void)stream;
    void *memory = 0;
    int before;
    if (runtime.get_device(&before) || (before != device && runtime.set_device(device))) {
        runtime.take_error();
        return 0;
    }
    if (runtime.allocate(&memory, bytes)) {
        memory = 0;
        runtime.take_error(); /* else torch reports it at the next kernel */
    }
    if (before != device)
        runtime.set_device(before);
    return memory;
}

/* The runtime knows the device of a pointer. Errors are those of a runtime that is being unloaded: the memory is gone. */
void weft_release(void *memory, size bytes, int device, void *stream) {
    (void)bytes, (void)device, (void)stream;
    if (runtime.release(memory))
        runtime.take_error();
}
