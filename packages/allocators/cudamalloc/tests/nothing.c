/* A library without any of the runtime's functions. */
int nothing;
