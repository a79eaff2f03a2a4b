// What keeps the binary from needing a newer glibc than 2.28.

// libstdc++'s shared_ptr reads this variable of glibc 2.32, which says that the process has one
// thread, to do without atomic operations. One of our own, with the value of a process that has
// more, is always right.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
