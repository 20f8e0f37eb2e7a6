/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Locks that both languages take. */
#include <pthread.h>
#include <stdlib.h>
#include "internal.h"

struct fault_lock {
    pthread_mutex_t mutex;
};

struct fault_lock *fault_lock_new(void)
{
    struct fault_lock *lock = malloc(sizeof(*lock));

    if (lock)
        pthread_mutex_init(&lock->mutex, NULL);
    return lock;
}

void fault_lock_free(struct fault_lock *lock)
{
    pthread_mutex_destroy(&lock->mutex);
    free(lock);
}

void fault_lock_take(struct fault_lock *lock) { pthread_mutex_lock(&lock->mutex); }
void fault_lock_give(struct fault_lock *lock) { pthread_mutex_unlock(&lock->mutex); }

int fault_lock_is_taken(struct fault_lock *lock)
{
    if (pthread_mutex_trylock(&lock->mutex))
        return 1;
    pthread_mutex_unlock(&lock->mutex);
    return 0;
}
