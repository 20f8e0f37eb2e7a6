/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What a guest of the lab does with its network: threads receive messages over TCP and UDP at port
 * 7, check each word, and answer with other words.  Each message uses another page of a large area
 * that was filled before, as the requests to the disk do.
 *
 *     net messages N mismatches M connections C
 */
#include <arpa/inet.h>
#include <net/if.h>
#include <netinet/in.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#define NETWORK 0x0a630000u     /* 10.99.0.0/24 */
#define PORT 7
#define MESSAGE_WORDS 128u
#define MESSAGE_BYTES (MESSAGE_WORDS * sizeof(uint64_t))
#define NET_BUFFERS 128ul       /* pages of the area, for each thread */

struct net {
    unsigned char *area;
    _Atomic uint64_t messages, mismatches, connections;
};

struct net_thread {
    struct net *net;
    unsigned number;
    int socket;
};

/* A word of a request, or of an answer to a request.  The first word is the request's number. */
static uint64_t net_word(uint64_t number, int answer, unsigned i)
{
    return i ? mix((2 * number + answer) * MESSAGE_WORDS + i) : number;
}

/* Checks a request, and replaces it by the answer. */
static void answer(struct net *net, uint64_t *message)
{
    uint64_t number = message[0];

    net->messages++;
    for (unsigned i = 1; i < MESSAGE_WORDS; i++)
        if (message[i] != net_word(number, 0, i)) {
            net->mismatches++;
            break;
        }
    for (unsigned i = 1; i < MESSAGE_WORDS; i++)
        message[i] = net_word(number, 1, i);
}

static uint64_t *net_buffer(const struct net_thread *own, uint64_t turn)
{
    uint64_t page = own->number * NET_BUFFERS + mix(turn) % NET_BUFFERS;

    return (uint64_t *)(own->net->area + page * PAGE);
}

static void *serve_tcp(void *argument)
{
    struct net_thread *own = argument;
    uint64_t turn = 0;

    for (;;) {
        int connection = accept(own->socket, NULL, NULL);

        if (connection < 0)
            continue;
        own->net->connections++;
        for (;; turn++) {
            uint64_t *message = net_buffer(own, turn);

            if (recv(connection, message, MESSAGE_BYTES, MSG_WAITALL) != (ssize_t)MESSAGE_BYTES)
                break;
            answer(own->net, message);
            if (send(connection, message, MESSAGE_BYTES, MSG_NOSIGNAL) != (ssize_t)MESSAGE_BYTES)
                break;
        }
        close(connection);
    }
    return NULL;
}

static void *serve_udp(void *argument)
{
    struct net_thread *own = argument;

    for (uint64_t turn = 0;; turn++) {
        uint64_t *message = net_buffer(own, turn);
        struct sockaddr_in from;
        socklen_t length = sizeof(from);

        if (recvfrom(own->socket, message, MESSAGE_BYTES, 0, (struct sockaddr *)&from, &length) !=
            (ssize_t)MESSAGE_BYTES)
            continue;
        answer(own->net, message);
        sendto(own->socket, message, MESSAGE_BYTES, 0, (struct sockaddr *)&from, length);
    }
    return NULL;
}

/* Gives eth0 an address in the network, as soon as it is there.  Returns whether it has one. */
static int configure_network(unsigned host)
{
    struct ifreq request = { .ifr_name = "eth0" };
    struct sockaddr_in *address = (struct sockaddr_in *)&request.ifr_addr;
    int fd = socket(AF_INET, SOCK_DGRAM, 0), failed;

    for (int tries = 0; ioctl(fd, SIOCGIFINDEX, &request) && tries < 600; tries++)
        usleep(100000);
    address->sin_family = AF_INET;
    address->sin_addr.s_addr = htonl(NETWORK | host);
    failed = ioctl(fd, SIOCSIFADDR, &request);
    address->sin_addr.s_addr = htonl(0xffffff00);
    failed = failed || ioctl(fd, SIOCSIFNETMASK, &request);
    failed = failed || ioctl(fd, SIOCGIFFLAGS, &request);
    request.ifr_flags |= IFF_UP;
    failed = failed || ioctl(fd, SIOCSIFFLAGS, &request);
    close(fd);
    return !failed;
}

/* Starts a thread at a socket of a type.  Returns whether that succeeds. */
static int start_serving(struct net *net, unsigned number, int type, void *(*serve)(void *))
{
    struct sockaddr_in all = { .sin_family = AF_INET, .sin_port = htons(PORT) };
    struct net_thread *own = calloc(1, sizeof(*own));
    pthread_t thread;

    if (!own)
        return 0;
    own->net = net;
    own->number = number;
    own->socket = socket(AF_INET, type, 0);
    if (bind(own->socket, (struct sockaddr *)&all, sizeof(all)) ||
        (type == SOCK_STREAM && listen(own->socket, 4)) ||
        pthread_create(&thread, NULL, serve, own)) {
        free(own);
        return 0;
    }
    return 1;
}

/* Returns whether the network is there and used. */
static int start_net(struct net *net, unsigned host)
{
    net->area = mmap(NULL, 2 * NET_BUFFERS * PAGE, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (net->area == MAP_FAILED || !load("/xen-netfront.ko") || !configure_network(host) ||
        !start_serving(net, 0, SOCK_STREAM, serve_tcp) ||
        !start_serving(net, 1, SOCK_DGRAM, serve_udp)) {
        printf("no network: %s\n", strerror(errno));
        return 0;
    }
    printf("network is used\n");
    return 1;
}

static void print_net(struct net *net)
{
    printf("net messages %lu mismatches %lu connections %lu\n", (unsigned long)net->messages,
           (unsigned long)net->mismatches, (unsigned long)net->connections);
}
