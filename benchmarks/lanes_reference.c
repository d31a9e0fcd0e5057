/* Steps of pmcmc by hand, with lanes innermost: what the blocks of a CPU are held against in benchmarks/lanes.py.

   One library is compiled for each case: -DMIXTURE, -DEIGHT_SCHOOLS or -DLOGISTIC. LANES lanes form a tile and step
   together. Arrays have the shapes (tiles, steps, numbers, LANES), so every loop over lanes runs over neighbours. */

#include <math.h>
#include <stdint.h>

#ifdef MIXTURE /* MALA without a basis */
#define D 2
#define LEAPFROGS 0
#elif defined EIGHT_SCHOOLS /* HMC in a dense basis */
#define D 10
#define LEAPFROGS 4
#define JITTER 0.2f
#elif defined LOGISTIC /* MALA in a dense basis */
#define D 25
#define LEAPFROGS 0
#define ROWS 1000
#define AT_ONCE 8 /* rows of the design per pass over the coordinates */
#endif

#define CHUNK 16                           /* steps whose noise is drawn at once; it stays in the cache */
#define UNIFORMS (D + 1 + (LEAPFROGS > 0)) /* normals, log uniform; HMC: jitter */
#define HASHES ((UNIFORMS + 1) / 2)        /* a hash gives two uniforms */
#define INFO (4 + (LEAPFROGS > 0))         /* acceptance rate, divergence, margin, log density; HMC: energy */
#define EACH for (int w = 0; w < LANES; w++)

typedef float row[LANES]; /* one number of every lane */
typedef uint32_t words[LANES];

typedef struct {
  float step_size;
#ifndef MIXTURE
  float loc[D], scale[D][D]; /* the basis: x = loc + scale y */
#endif
#ifdef EIGHT_SCHOOLS
  float effect[8], error[8];
#elif defined LOGISTIC
  float label[ROWS], design[ROWS][D];
#endif
} constants;

typedef struct {
  row position[D], logdensity, gradient[D];
} state;

/* ---- Noise: pmcmc.random.streams and pmcmc.random.distributions ---- */

/* Hash the words (first, second) by threefry-2x32, with one key for each lane. */
static inline void threefry(const words k0, const words k1, words first, words second) {
  static const int rotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  EACH {
    uint32_t key[3] = {k0[w], k1[w], k0[w] ^ k1[w] ^ 0x1BD11BDAu}, x = first[w] + key[0], y = second[w] + key[1];
#pragma GCC unroll 5
    for (int group = 0; group < 5; group++) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        int r = rotations[group % 2][i];
        x += y;
        y = x ^ (y << r | y >> (32 - r));
      }
      x += key[(group + 1) % 3];
      y += key[(group + 2) % 3] + group + 1;
    }
    first[w] = x, second[w] = y;
  }
}

/* Centre of the cell of a word among 2^23 cells of (0, 1). */
static inline float uniform(uint32_t word) { return ((float)(int32_t)(word >> 9) + 0.5f) * 0x1p-23f; }

/* Polynomials of Giles (2012) for the inverse distribution function of the normal. */
static inline float normal(float u) {
  static const float central[9] = {2.81022636e-08f, 3.43273939e-07f,  -3.5233877e-06f, -4.39150654e-06f, 0.00021858087f,
                                   -0.00125372503f, -0.00417768164f,  0.246640727f,    1.50140941f};
  static const float tail[9] = {-0.000200214257f, 0.000100950558f, 0.00134934322f, -0.00367342844f, 0.00573950773f,
                                -0.0076224613f,   0.00943887047f,  1.00167406f,    2.83297682f};
  float w = -logf(4 * u * (1 - u)), near = w - 2.5f, far = sqrtf(w) - 3, p = central[0], q = tail[0];
#pragma GCC unroll 8
  for (int i = 1; i < 9; i++) p = central[i] + p * near, q = tail[i] + q * far;
  return 1.41421356f * (2 * u - 1) * (w < 5 ? p : q);
}

/* Draw the noise of one step of every lane: normals, the log of a uniform, and the jitter of HMC. */
static inline void draw_step(const uint32_t key[2], const words number, row noise[UNIFORMS]) {
  words k0, k1, high, low;
  row u[2 * HASHES];
  EACH k0[w] = key[0], k1[w] = key[1], high[w] = 0, low[w] = number[w];
  threefry(k0, k1, high, low);
  EACH k0[w] = high[w], k1[w] = low[w];
  for (int j = 0; j < HASHES; j++) {
    EACH high[w] = j, low[w] = 0;
    threefry(k0, k1, high, low);
    EACH u[j][w] = uniform(high[w]), u[HASHES + j][w] = uniform(low[w]);
  }
  for (int i = 0; i < D; i++) EACH noise[i][w] = normal(u[UNIFORMS - D + i][w]);
  EACH noise[D][w] = logf(u[0][w]);
  if (LEAPFROGS) EACH noise[UNIFORMS - 1][w] = 2 * u[1][w] - 1;
}

/* ---- Log densities and their gradients, at positions x ---- */

#ifdef MIXTURE
static inline void density(const constants *c, row x[D], row value, row gradient[D]) {
  (void)c;
  EACH {
    float a = x[0][w], b = x[1][w], exponent[4], largest = -0x1p126f, total = 0, left = 0, up = 0;
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
      float dx = (k & 1 ? -2 : 2) - a, dy = (k & 2 ? -2 : 2) - b;
      exponent[k] = -0.5f * (dx * dx + dy * dy);
      largest = exponent[k] > largest ? exponent[k] : largest;
    }
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
      float weight = expf(exponent[k] - largest);
      total += weight, left += weight * ((k & 1 ? -2 : 2) - a), up += weight * ((k & 2 ? -2 : 2) - b);
    }
    value[w] = largest + logf(total), gradient[0][w] = left / total, gradient[1][w] = up / total;
  }
}
#elif defined EIGHT_SCHOOLS
static inline void density(const constants *c, row x[D], row value, row gradient[D]) {
  row tau, by_mu, by_tau;
  EACH {
    float mu = x[0][w], log_tau = x[1][w];
    tau[w] = expf(log_tau);
    float square = tau[w] * tau[w] / 25;
    value[w] = log_tau - 0.5f * mu * mu - logf(1 + square);
    by_mu[w] = -mu, by_tau[w] = 1 - 2 * square / (1 + square);
  }
  for (int k = 0; k < 8; k++) {
    float precision = 1 / (c->error[k] * c->error[k]);
    EACH {
      float z = x[2 + k][w], residual = c->effect[k] - 5 * x[0][w] - tau[w] * z, slope = precision * residual;
      value[w] -= 0.5f * (z * z + residual * slope);
      by_mu[w] += 5 * slope, by_tau[w] += tau[w] * z * slope, gradient[2 + k][w] = tau[w] * slope - z;
    }
  }
  EACH gradient[0][w] = by_mu[w], gradient[1][w] = by_tau[w];
}
#elif defined LOGISTIC
static inline void density(const constants *c, row x[D], row value, row gradient[D]) {
  EACH value[w] = 0;
  for (int i = 0; i < D; i++) EACH value[w] -= 0.5f * x[i][w] * x[i][w], gradient[i][w] = -x[i][w];
  for (int n = 0; n < ROWS; n += AT_ONCE) {
    row r[AT_ONCE] = {{0}}; /* logits, then residuals */
    for (int i = 0; i < D; i++)
      EACH {
#pragma GCC unroll 8
        for (int m = 0; m < AT_ONCE; m++) r[m][w] += c->design[n + m][i] * x[i][w];
      }
    for (int m = 0; m < AT_ONCE; m++)
      EACH {
        float logit = r[m][w], label = c->label[n + m], e = expf(-fabsf(logit));
        value[w] += label * logit - fmaxf(logit, 0) - logf(1 + e);
        r[m][w] = label - (logit > 0 ? 1 : e) / (1 + e);
      }
    for (int i = 0; i < D; i++)
      EACH {
        float sum = gradient[i][w];
#pragma GCC unroll 8
        for (int m = 0; m < AT_ONCE; m++) sum += c->design[n + m][i] * r[m][w];
        gradient[i][w] = sum;
      }
  }
}
#endif

/* Fill in the log density and the gradient with respect to the coordinates of the basis. */
static inline void evaluate(const constants *c, state *s) {
#ifdef MIXTURE
  density(c, s->position, s->logdensity, s->gradient);
#else
  row x[D], g[D];
  for (int i = 0; i < D; i++)
    EACH {
      float sum = c->loc[i];
#pragma GCC unroll 32
      for (int j = 0; j < D; j++) sum += c->scale[i][j] * s->position[j][w];
      x[i][w] = sum;
    }
  density(c, x, s->logdensity, g);
  for (int j = 0; j < D; j++)
    EACH {
      float sum = 0;
#pragma GCC unroll 32
      for (int i = 0; i < D; i++) sum += c->scale[i][j] * g[i][w];
      s->gradient[j][w] = sum;
    }
#endif
}

/* ---- Steps ---- */

/* Propose a state, and compute the log acceptance ratio; HMC also the energies before and after. */
static inline void propose(const constants *c, const state *now, const row noise[UNIFORMS], state *new, row ratio,
                           row energy[2]) {
#if LEAPFROGS
  row momentum[D], h, before = {0}, after = {0};
  EACH h[w] = c->step_size * (1 + JITTER * noise[D + 1][w]);
  for (int i = 0; i < D; i++)
    EACH {
      before[w] += noise[i][w] * noise[i][w];
      momentum[i][w] = noise[i][w] + 0.5f * h[w] * now->gradient[i][w];
      new->position[i][w] = now->position[i][w];
    }
  for (int l = 1; l <= LEAPFROGS; l++) {
    for (int i = 0; i < D; i++) EACH new->position[i][w] += h[w] * momentum[i][w];
    evaluate(c, new);
    float share = l < LEAPFROGS ? 1 : 0.5f;
    for (int i = 0; i < D; i++) EACH momentum[i][w] += share * h[w] * new->gradient[i][w];
  }
  for (int i = 0; i < D; i++) EACH after[w] += momentum[i][w] * momentum[i][w];
  EACH {
    energy[0][w] = 0.5f * before[w] - now->logdensity[w], energy[1][w] = 0.5f * after[w] - new->logdensity[w];
    ratio[w] = energy[0][w] - energy[1][w];
  }
#else
  (void)energy;
  float h = c->step_size, spread = sqrtf(2 * h), half = sqrtf(h / 2);
  for (int i = 0; i < D; i++)
    EACH new->position[i][w] = now->position[i][w] + h * now->gradient[i][w] + spread * noise[i][w];
  evaluate(c, new);
  EACH ratio[w] = new->logdensity[w] - now->logdensity[w];
  for (int i = 0; i < D; i++)
    EACH {
      float z = noise[i][w], back = z + half * (now->gradient[i][w] + new->gradient[i][w]);
      ratio[w] += 0.5f * (z * z - back * back);
    }
#endif
}

/* Take one step, and record the position and the info. */
static inline void step(const constants *c, state *restrict now, const row *restrict noise, row *restrict record) {
  state new;
  row ratio, margin, energy[2];
  propose(c, now, noise, &new, ratio, energy);
  EACH margin[w] = ratio[w] - noise[D][w];
  for (int i = 0; i < D; i++)
    EACH {
      record[i][w] = now->position[i][w] = margin[w] > 0 ? new.position[i][w] : now->position[i][w];
      now->gradient[i][w] = margin[w] > 0 ? new.gradient[i][w] : now->gradient[i][w];
    }
  EACH {
    now->logdensity[w] = margin[w] > 0 ? new.logdensity[w] : now->logdensity[w];
    record[D][w] = expf(fminf(ratio[w], 0));
    record[D + 1][w] = -ratio[w] > 1000;
    record[D + 2][w] = margin[w];
    record[D + 3][w] = now->logdensity[w];
    if (LEAPFROGS) record[D + INFO - 1][w] = margin[w] > 0 ? energy[1][w] : energy[0][w];
  }
}

static inline void begin(const constants *c, const row start[D], state *s) {
  for (int i = 0; i < D; i++) EACH s->position[i][w] = start[i][w];
  evaluate(c, s);
}

/* ---- What Python calls; all lanes belong to one chain and begin at the steps `first` ---- */

/* Noise alone, (tiles, steps, UNIFORMS, LANES). */
void draw(const uint32_t key[2], const words *first, int tiles, int steps, row *noise) {
  for (int tile = 0; tile < tiles; tile++)
    for (int t = 0; t < steps; t++, noise += UNIFORMS) {
      words number;
      EACH number[w] = first[tile][w] + t;
      draw_step(key, number, noise);
    }
}

/* Steps alone: the noise is given. Records are (tiles, steps, D + INFO, LANES), starts (tiles, D, LANES). */
void walk(const constants *c, const row *start, int tiles, int steps, const row *noise, row *record) {
  for (int tile = 0; tile < tiles; tile++) {
    state s;
    begin(c, start + tile * D, &s);
    for (int t = 0; t < steps; t++, noise += UNIFORMS, record += D + INFO) step(c, &s, noise, record);
  }
}

/* Both: the noise of a chunk, then its steps. The number of steps is a multiple of CHUNK. */
void sample(const constants *c, const uint32_t key[2], const words *first, const row *start, int tiles, int steps,
            row *record) {
  for (int tile = 0; tile < tiles; tile++) {
    state s;
    row noise[CHUNK * UNIFORMS];
    begin(c, start + tile * D, &s);
    for (int t = 0; t < steps; t += CHUNK) {
      words number;
      EACH number[w] = first[tile][w] + t;
      draw(key, &number, 1, CHUNK, noise);
      for (int i = 0; i < CHUNK; i++, record += D + INFO) step(c, &s, noise + i * UNIFORMS, record);
    }
  }
}
