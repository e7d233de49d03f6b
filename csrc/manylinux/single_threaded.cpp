// Of wheels only: libstdc++ asks it of glibc 2.32 and later whether it can leave out its locks. It cannot.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
