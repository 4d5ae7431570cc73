/* The guest's agent: waits in a template, makes a restored guest a machine of its own,
 * then carries an SSH session between the virtio-serial port and an SSH server.
 *
 *     agent PORT PROGRAM
 *
 * PROGRAM (an SSH server in inetd mode) is started at once, on a socket pair; what it
 * says is held back. The agent writes "SMOLVM-READY\n" to PORT and waits for the host:
 *
 *     host:  magic "SMOLVM-WAKE\n", u32 length, body        (all numbers little-endian)
 *     body:  64 random bytes; u8 length, host name; u16 count of files; for each file:
 *            u8 make (0: only if it exists), u16 mode, u16 length, path, u32 length, data
 *     agent: 'T'                        once all of it has been applied
 *     host:  'S' i64 seconds, u32 ns    as often as it likes; the agent sets the clock
 *     agent: 'T'                        after each
 *     host:  'G'                        from here on, both directions belong to SSH
 *
 * What cannot be done is told as 'E' u8 step u8 errno, and the agent ends.
 *
 * Static, without a C library: it runs in guests of any distribution. Built by
 * script/agent; the binary lies beside this file.
 */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
typedef long i64;

#if defined(__x86_64__)
enum { READ = 0, WRITE = 1, CLOSE = 3, IOCTL = 16, DUP3 = 292, NANOSLEEP = 35,
       SOCKETPAIR = 53, FORK = 57, EXECVE = 59, EXIT = 231, SETHOSTNAME = 170,
       CLOCK_SETTIME = 227, OPENAT = 257, PPOLL = 271, LSEEK = 8, FTRUNCATE = 77 };
static i64 call(i64 number, i64 a, i64 b, i64 c, i64 d, i64 e)
{
    i64 result;
    register i64 r10 __asm__("r10") = d;
    register i64 r8 __asm__("r8") = e;
    __asm__ volatile("syscall" : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
                     : "rcx", "r11", "memory");
    return result;
}
__asm__(".globl _start\n_start:\n mov %rsp, %rdi\n and $-16, %rsp\n call run\n");
static i64 fork(void) { return call(FORK, 0, 0, 0, 0, 0); }
#elif defined(__aarch64__)
enum { READ = 63, WRITE = 64, CLOSE = 57, IOCTL = 29, DUP3 = 24, NANOSLEEP = 101,
       SOCKETPAIR = 199, CLONE = 220, EXECVE = 221, EXIT = 94, SETHOSTNAME = 161,
       CLOCK_SETTIME = 112, OPENAT = 56, PPOLL = 73, LSEEK = 62, FTRUNCATE = 46 };
static i64 call(i64 number, i64 a, i64 b, i64 c, i64 d, i64 e)
{
    register i64 x8 __asm__("x8") = number;
    register i64 x0 __asm__("x0") = a;
    register i64 x1 __asm__("x1") = b;
    register i64 x2 __asm__("x2") = c;
    register i64 x3 __asm__("x3") = d;
    register i64 x4 __asm__("x4") = e;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4) : "memory");
    return x0;
}
__asm__(".globl _start\n_start:\n mov x0, sp\n bl run\n");
enum { SIGCHLD = 17 };
static i64 fork(void) { return call(CLONE, SIGCHLD, 0, 0, 0, 0); }
#else
#error "no system calls for this architecture yet"
#endif

/* include/uapi/asm-generic/fcntl.h, linux/random.h, asm-generic/poll.h, linux/socket.h */
enum { AT_FDCWD = -100, O_WRONLY = 1, O_RDWR = 2, O_CREAT = 0100, SEEK_END = 2,
       O_CLOEXEC = 02000000, RNDADDENTROPY = 0x40085203, RNDRESEEDCRNG = 0x5207,
       POLLIN = 1, AF_UNIX = 1, SOCK_STREAM = 1, CLOCK_REALTIME = 0, EBUSY = 16 };
enum { PORT_BUSY_TRIES = 200, PORT_BUSY_NS = 10000000, SEED_BYTES = 64, BODY_MAX = 1 << 20 };
enum step { BAD_MESSAGE = 1, SEED, HOST_NAME, FILES, CLOCK };

static u8 body[BODY_MAX];
static u8 buffer[65536];
static int port;

__attribute__((noreturn)) static void end(int status)
{
    for (;;)
        call(EXIT, status, 0, 0, 0, 0);
}

static void pause_ns(u32 ns)
{
    i64 wait[2] = {0, ns};
    call(NANOSLEEP, (i64)wait, 0, 0, 0, 0);
}

static int write_all(int to, const u8 *data, i64 length)
{
    while (length > 0) {
        i64 done = call(WRITE, to, (i64)data, length, 0, 0);
        if (done <= 0)
            return -1;
        data += done;
        length -= done;
    }
    return 0;
}

static void read_all(u8 *data, i64 length)
{
    while (length > 0) {
        i64 done = call(READ, port, (i64)data, length, 0, 0);
        if (done < 0)
            end(1);
        if (done == 0) /* the host's end is not open yet, or no more */
            pause_ns(PORT_BUSY_NS);
        data += done;
        length -= done;
    }
}

static void fail(enum step step, i64 result)
{
    u8 message[3] = {'E', (u8)step, (u8)-result};
    write_all(port, message, sizeof message);
    end(1);
}

static u64 number(const u8 *data, int bytes)
{
    u64 value = 0;
    while (bytes-- > 0)
        value = value << 8 | data[bytes];
    return value;
}

/* Both halves matter: the pool gets what no other guest has, and what is drawn from now
 * on depends on it (random(4); drivers/char/random.c). */
static void seed_random(const u8 *seed)
{
    struct { u32 entropy_bits, bytes; u8 data[SEED_BYTES]; } pool;
    pool.entropy_bits = SEED_BYTES * 8;
    pool.bytes = SEED_BYTES;
    for (int i = 0; i < SEED_BYTES; i++)
        pool.data[i] = seed[i];
    i64 device = call(OPENAT, AT_FDCWD, (i64)"/dev/urandom", O_RDWR | O_CLOEXEC, 0, 0);
    if (device < 0)
        fail(SEED, device);
    i64 result = call(IOCTL, device, RNDADDENTROPY, (i64)&pool, 0, 0);
    if (result < 0)
        fail(SEED, result);
    result = call(IOCTL, device, RNDRESEEDCRNG, 0, 0, 0);
    if (result < 0)
        fail(SEED, result);
    call(CLOSE, device, 0, 0, 0, 0);
}

/* What is there is written over, and cut off only where there was more of it: making a file
 * anew takes a file system many times as long. */
static void write_file(const char *path, int make, u16 mode, const u8 *data, u32 length)
{
    i64 flags = O_WRONLY | O_CLOEXEC | (make ? O_CREAT : 0);
    i64 file = call(OPENAT, AT_FDCWD, (i64)path, flags, mode, 0);
    if (file < 0) {
        if (make)
            fail(FILES, file);
        return;
    }
    if (write_all((int)file, data, length) < 0)
        fail(FILES, 0);
    if (call(LSEEK, file, 0, SEEK_END, 0, 0) > (i64)length)
        call(FTRUNCATE, file, length, 0, 0, 0);
    call(CLOSE, file, 0, 0, 0, 0);
}

static void apply(u32 length)
{
    const u8 *at = body, *stop = body + length;
    seed_random(at);
    at += SEED_BYTES;
    u8 name_length = *at++;
    if (at + name_length + 2 > stop)
        fail(BAD_MESSAGE, 0);
    i64 result = call(SETHOSTNAME, (i64)at, name_length, 0, 0, 0);
    if (result < 0)
        fail(HOST_NAME, result);
    at += name_length;
    u16 files = (u16)number(at, 2);
    at += 2;
    while (files-- > 0) {
        static char path[4096];
        if (at + 5 > stop)
            fail(BAD_MESSAGE, 0);
        int make = at[0];
        u16 mode = (u16)number(at + 1, 2), path_length = (u16)number(at + 3, 2);
        at += 5;
        if (path_length >= sizeof path || at + path_length + 4 > stop)
            fail(BAD_MESSAGE, 0);
        for (u16 i = 0; i < path_length; i++)
            path[i] = (char)at[i];
        path[path_length] = 0;
        at += path_length;
        u32 data_length = (u32)number(at, 4);
        at += 4;
        if (data_length > (u64)(stop - at))
            fail(BAD_MESSAGE, 0);
        write_file(path, make, mode, at, data_length);
        at += data_length;
    }
}

static void wait_for_host(void)
{
    static const char magic[] = "SMOLVM-WAKE\n";
    u8 head[sizeof magic - 1 + 4];
    read_all(head, sizeof head);
    for (u32 i = 0; i < sizeof magic - 1; i++)
        if (head[i] != (u8)magic[i])
            fail(BAD_MESSAGE, 0);
    u32 length = (u32)number(head + sizeof magic - 1, 4);
    if (length < SEED_BYTES + 3 || length > BODY_MAX)
        fail(BAD_MESSAGE, 0);
    read_all(body, length);
    apply(length);
    for (;;) {
        u8 order;
        write_all(port, (const u8 *)"T", 1);
        read_all(&order, 1);
        if (order == 'G')
            return;
        u8 stamp[12];
        if (order != 'S')
            fail(BAD_MESSAGE, 0);
        read_all(stamp, sizeof stamp);
        i64 now[2] = {(i64)number(stamp, 8), (i64)number(stamp + 8, 4)};
        i64 result = call(CLOCK_SETTIME, CLOCK_REALTIME, (i64)now, 0, 0, 0);
        if (result < 0)
            fail(CLOCK, result);
    }
}

static void carry(int server)
{
    struct { int fd; short events, revents; } ends[2] = {{port, POLLIN, 0}, {server, POLLIN, 0}};
    for (;;) {
        if (call(PPOLL, (i64)ends, 2, 0, 0, 0) < 0)
            return;
        for (int i = 0; i < 2; i++) {
            if (!ends[i].revents)
                continue;
            i64 length = call(READ, ends[i].fd, (i64)buffer, sizeof buffer, 0, 0);
            if (length <= 0 || write_all(ends[1 - i].fd, buffer, length) < 0)
                return;
        }
    }
}

__attribute__((noreturn, used)) void run(i64 *stack)
{
    char **arguments = (char **)(stack + 1);
    char **environment = arguments + stack[0] + 1;
    if (stack[0] < 3)
        end(2);
    /* An agent that was here before may not have let go of the port yet. */
    i64 opened = -EBUSY;
    for (int i = 0; i < PORT_BUSY_TRIES && opened == -EBUSY; i++) {
        opened = call(OPENAT, AT_FDCWD, (i64)arguments[1], O_RDWR | O_CLOEXEC, 0, 0);
        if (opened == -EBUSY)
            pause_ns(PORT_BUSY_NS);
    }
    if (opened < 0)
        end(1);
    port = (int)opened;
    int pair[2];
    if (call(SOCKETPAIR, AF_UNIX, SOCK_STREAM | O_CLOEXEC, 0, (i64)pair, 0) < 0)
        end(1);
    i64 child = fork();
    if (child < 0)
        end(1);
    if (child == 0) {
        call(DUP3, pair[1], 0, 0, 0, 0);
        call(DUP3, pair[1], 1, 0, 0, 0);
        call(EXECVE, (i64)arguments[2], (i64)(arguments + 2), (i64)environment, 0, 0);
        end(127);
    }
    call(CLOSE, pair[1], 0, 0, 0, 0);
    /* The server's greeting: from now on it needs nothing but the host. */
    struct { int fd; short events, revents; } greeting = {pair[0], POLLIN, 0};
    call(PPOLL, (i64)&greeting, 1, 0, 0, 0);
    /* What the host had sent to the agent before. */
    struct { int fd; short events, revents; } stale = {port, POLLIN, 0};
    i64 at_once[2] = {0, 0};
    while (call(PPOLL, (i64)&stale, 1, (i64)at_once, 0, 0) == 1 && (stale.revents & POLLIN))
        if (call(READ, port, (i64)buffer, sizeof buffer, 0, 0) <= 0)
            break;
    static const char ready[] = "SMOLVM-READY\n";
    write_all(port, (const u8 *)ready, sizeof ready - 1);
    wait_for_host();
    carry(pair[0]);
    end(0);
}
