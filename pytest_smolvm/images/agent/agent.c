/* The guest's agent: waits in a template, makes a restored guest a machine of its own,
 * then carries an SSH session between the virtio-serial port and an SSH server.
 *
 *     agent PORT PROGRAM
 *     agent vsock PROGRAM   the same where there is no such port: listens on vsock port 1025
 *     agent relay           listens on vsock port 1024; each connection begins with the number
 *                           of a TCP port (u16), to which it is led on 127.0.0.1
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
 * What cannot be done is told as 'E' u8 step u8 errno, and the agent ends. A vsock connection
 * that ends before 'G' (the saving of a machine ends all of them) is followed by another one;
 * "SMOLVM-READY\n" is only said on the first.
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
       CLOCK_SETTIME = 227, OPENAT = 257, PPOLL = 271, LSEEK = 8, FTRUNCATE = 77,
       SOCKET = 41, CONNECT = 42, SHUTDOWN = 48, BIND = 49, LISTEN = 50, ACCEPT4 = 288,
       WAIT4 = 61, RT_SIGPROCMASK = 14 };
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
       CLOCK_SETTIME = 112, OPENAT = 56, PPOLL = 73, LSEEK = 62, FTRUNCATE = 46,
       SOCKET = 198, CONNECT = 203, SHUTDOWN = 210, BIND = 200, LISTEN = 201, ACCEPT4 = 242,
       WAIT4 = 260, RT_SIGPROCMASK = 135 };
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

/* include/uapi/asm-generic/fcntl.h, linux/random.h, asm-generic/poll.h, linux/socket.h,
 * linux/vm_sockets.h */
enum { AT_FDCWD = -100, O_WRONLY = 1, O_RDWR = 2, O_CREAT = 0100, SEEK_END = 2,
       O_CLOEXEC = 02000000, RNDADDENTROPY = 0x40085203, RNDRESEEDCRNG = 0x5207,
       POLLIN = 1, AF_UNIX = 1, AF_INET = 2, AF_VSOCK = 40, SOCK_STREAM = 1, SHUT_WR = 1, SIGPIPE = 13,
       SOCK_CLOEXEC = O_CLOEXEC, WNOHANG = 1, CLOCK_REALTIME = 0, EBUSY = 16, EINTR = 4 };
enum { PORT_BUSY_TRIES = 200, PORT_BUSY_NS = 10000000, SEED_BYTES = 64, BODY_MAX = 1 << 20 };
enum { RELAY_PORT = 1024, AGENT_PORT = 1025, BACKLOG = 64 };
enum step { BAD_MESSAGE = 1, SEED, HOST_NAME, FILES, CLOCK };

static u8 body[BODY_MAX];
static u8 buffer[65536];
static int port;
static int listener = -1; /* on vsock; -1: the port is a virtio-serial one */

__attribute__((noreturn)) static void end(int status)
{
    for (;;)
        call(EXIT, status, 0, 0, 0, 0);
}

/* A connection that is gone is told by write(2). */
static void block_sigpipe(void)
{
    u64 mask = 1UL << (SIGPIPE - 1);
    call(RT_SIGPROCMASK, 0, (i64)&mask, 0, sizeof mask, 0);
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

/* -1: the connection has ended, and another will come. */
static int read_all(u8 *data, i64 length)
{
    while (length > 0) {
        i64 done = call(READ, port, (i64)data, length, 0, 0);
        if (done <= 0 && listener >= 0)
            return -1;
        if (done < 0)
            end(1);
        if (done == 0) /* the host's end is not open yet, or no more */
            pause_ns(PORT_BUSY_NS);
        data += done;
        length -= done;
    }
    return 0;
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

static int wait_for_host(void)
{
    static const char magic[] = "SMOLVM-WAKE\n";
    u8 head[sizeof magic - 1 + 4];
    if (read_all(head, sizeof head) < 0)
        return -1;
    for (u32 i = 0; i < sizeof magic - 1; i++)
        if (head[i] != (u8)magic[i])
            fail(BAD_MESSAGE, 0);
    u32 length = (u32)number(head + sizeof magic - 1, 4);
    if (length < SEED_BYTES + 3 || length > BODY_MAX)
        fail(BAD_MESSAGE, 0);
    if (read_all(body, length) < 0)
        return -1;
    apply(length);
    for (;;) {
        u8 order;
        write_all(port, (const u8 *)"T", 1);
        if (read_all(&order, 1) < 0)
            return -1;
        if (order == 'G')
            return 0;
        u8 stamp[12];
        if (order != 'S')
            fail(BAD_MESSAGE, 0);
        if (read_all(stamp, sizeof stamp) < 0)
            return -1;
        i64 now[2] = {(i64)number(stamp, 8), (i64)number(stamp + 8, 4)};
        i64 result = call(CLOCK_SETTIME, CLOCK_REALTIME, (i64)now, 0, 0, 0);
        if (result < 0)
            fail(CLOCK, result);
    }
}

/* Until both sides have said all they had to say, or one is gone. */
static void carry(int one, int other)
{
    struct { int fd; short events, revents; } ends[2] = {{one, POLLIN, 0}, {other, POLLIN, 0}};
    for (int open = 2; open > 0;) {
        if (call(PPOLL, (i64)ends, 2, 0, 0, 0) < 0)
            return;
        for (int i = 0; i < 2; i++) {
            if (!ends[i].revents)
                continue;
            int from = ends[i].fd, to = i ? one : other;
            i64 length = call(READ, from, (i64)buffer, sizeof buffer, 0, 0);
            if (length < 0 || write_all(to, buffer, length) < 0)
                return;
            if (length == 0) {
                ends[i].fd = -1; /* not looked at any more: poll(2) */
                open--;
                /* What is no socket cannot be told, and is the end of it. */
                if (call(SHUTDOWN, to, SHUT_WR, 0, 0, 0) < 0)
                    return;
            }
        }
    }
}

static int listen_on_vsock(u32 number)
{
    struct { u16 family, reserved; u32 port, cid; u8 flags, zero[3]; } address =
        {AF_VSOCK, 0, number, 0xffffffff, 0, {0, 0, 0}};
    i64 sock = call(SOCKET, AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0, 0, 0);
    if (sock < 0)
        end(1);
    /* Who was here before may not have let go of it yet. */
    i64 bound = -1;
    for (int i = 0; i < PORT_BUSY_TRIES && bound < 0; i++) {
        bound = call(BIND, sock, (i64)&address, sizeof address, 0, 0);
        if (bound < 0)
            pause_ns(PORT_BUSY_NS);
    }
    if (bound < 0 || call(LISTEN, sock, BACKLOG, 0, 0, 0) < 0)
        end(1);
    return (int)sock;
}

static int accept_on(int sock)
{
    for (;;) {
        i64 accepted = call(ACCEPT4, sock, 0, 0, SOCK_CLOEXEC, 0);
        if (accepted >= 0)
            return (int)accepted;
        if (accepted != -EINTR)
            pause_ns(PORT_BUSY_NS); /* one that was given up meanwhile, or a lack of something */
    }
}

__attribute__((noreturn)) static void relay_one(int vsock)
{
    u8 wanted[2];
    port = vsock;
    listener = vsock; /* so that an end of it is told */
    if (read_all(wanted, sizeof wanted) < 0)
        end(1);
    /* Both in network byte order: ip(7). */
    struct { u16 family; u8 port[2]; u8 address[4]; u8 zero[8]; } target =
        {AF_INET, {wanted[1], wanted[0]}, {127, 0, 0, 1}, {0}};
    i64 sock = call(SOCKET, AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0, 0, 0);
    if (sock < 0 || call(CONNECT, sock, (i64)&target, sizeof target, 0, 0) < 0)
        end(1);
    carry(vsock, (int)sock);
    end(0);
}

__attribute__((noreturn)) static void relay(void)
{
    int sock = listen_on_vsock(RELAY_PORT);
    block_sigpipe();
    for (;;) {
        int accepted = accept_on(sock);
        i64 child = fork();
        if (child == 0)
            relay_one(accepted);
        call(CLOSE, accepted, 0, 0, 0, 0);
        while (call(WAIT4, -1, 0, WNOHANG, 0, 0) > 0)
            ;
    }
}

static int is_word(const char *text, const char *word)
{
    while (*word && *text == *word)
        text++, word++;
    return *text == *word;
}

__attribute__((noreturn, used)) void run(i64 *stack)
{
    char **arguments = (char **)(stack + 1);
    char **environment = arguments + stack[0] + 1;
    if (stack[0] == 2 && is_word(arguments[1], "relay"))
        relay();
    if (stack[0] < 3)
        end(2);
    if (is_word(arguments[1], "vsock")) {
        listener = listen_on_vsock(AGENT_PORT);
    } else {
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
    }
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
    block_sigpipe();
    /* The server's greeting: from now on it needs nothing but the host. */
    struct { int fd; short events, revents; } greeting = {pair[0], POLLIN, 0};
    call(PPOLL, (i64)&greeting, 1, 0, 0, 0);
    if (listener >= 0) {
        port = accept_on(listener);
    } else {
        /* What the host had sent to the agent before. */
        struct { int fd; short events, revents; } stale = {port, POLLIN, 0};
        i64 at_once[2] = {0, 0};
        while (call(PPOLL, (i64)&stale, 1, (i64)at_once, 0, 0) == 1 && (stale.revents & POLLIN))
            if (call(READ, port, (i64)buffer, sizeof buffer, 0, 0) <= 0)
                break;
    }
    static const char ready[] = "SMOLVM-READY\n";
    write_all(port, (const u8 *)ready, sizeof ready - 1);
    while (wait_for_host() < 0) {
        call(CLOSE, port, 0, 0, 0, 0);
        port = accept_on(listener);
    }
    carry(port, pair[0]);
    end(0);
}
